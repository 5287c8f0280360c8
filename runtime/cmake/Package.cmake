# What `cmake --install` puts where, and the Debian package: `cpack -G DEB` in the build folder, or scripts/package.sh.
include(GNUInstallDirs)
set(CMAKE_SKIP_INSTALL_ALL_DEPENDENCY ON)  # what is installed is the program: neither tests nor benches are built for it

install(TARGETS thermocline)
install(FILES README.md deploy/debian/copyright DESTINATION share/doc/thermocline)
install(DIRECTORY docs/ DESTINATION share/doc/thermocline FILES_MATCHING PATTERN "*.md" PATTERN "*.svg" PATTERN README.md EXCLUDE)
install(FILES deploy/nginx.conf deploy/Caddyfile deploy/keys.conf deploy/compose.yaml deploy/Dockerfile
        deploy/prometheus.yml deploy/grafana/thermocline.json
        DESTINATION share/doc/thermocline/examples)
install(FILES deploy/thermocline.service DESTINATION lib/systemd/system)
# Settings belong in /etc beside a prefix of /usr, in etc of any other. Those that are there already stay.
install(CODE "
  set(etc \"\${CMAKE_INSTALL_PREFIX}/etc\")
  string(REGEX REPLACE \"/usr/etc$\" \"/etc\" etc \"\${etc}\")
  if(NOT EXISTS \"\$ENV{DESTDIR}\${etc}/thermocline/thermocline.toml\")
    file(INSTALL DESTINATION \"\${etc}/thermocline\" TYPE FILE FILES \"${CMAKE_SOURCE_DIR}/deploy/thermocline.toml\")
  endif()
  set(doc \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/share/doc/thermocline\")
  execute_process(COMMAND gzip -9nc \"${CMAKE_SOURCE_DIR}/deploy/debian/changelog\" OUTPUT_FILE \"\${doc}/changelog.gz\"
                  COMMAND_ERROR_IS_FATAL ANY)")

set(built_for "This build has no CUDA kernels: it computes on the CPU alone.")
if(TC_HAVE_CUDA)
  set(built_for "This build has CUDA kernels.")
endif()
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME thermocline)
set(CPACK_PACKAGE_CONTACT "The Thermocline authors <thermocline@localhost>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "Server for DeepSeek V4 models on one box, CPU and GPU")
set(CPACK_DEBIAN_PACKAGE_DESCRIPTION
    "Thermocline serves mixture-of-experts models of the DeepSeek V4 class over an
OpenAI-compatible HTTP API. Weights stay in their published FP4 and FP8
precision and are computed where they lie: experts in main memory, on the CPU;
attention and hot experts on a GPU.
${built_for}")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION net)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
foreach(script postinst prerm postrm conffiles)
  list(APPEND CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA ${CMAKE_SOURCE_DIR}/deploy/debian/${script})
endforeach()
include(CPack)
