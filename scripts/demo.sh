#!/usr/bin/env bash
# Installs, builds and answers a prompt with the bundled demo model. Arguments go to `thermocline run`.
. "$(dirname "$0")/common.sh"

install_packages $BUILD_PACKAGES
build release thermocline

PROGRAM=build/release/thermocline
if [ $# -gt 0 ]; then
  say "thermocline run --model models/demo $*"
  exec $PROGRAM run --model models/demo "$@"
fi
say "the demo model answers (a trained DeepSeek-V4 of 29 M parameters: see models/demo/README.md)"
for prompt in "What is the capital of Norway?" "What is a thermocline?" "Tell me a story."; do
  printf '\n> %s\n' "$prompt"
  $PROGRAM run --model models/demo --temperature 0 --prompt "$prompt"
done
say "more: $PROGRAM run --model models/demo --chat    |    $PROGRAM serve --model models/demo"
