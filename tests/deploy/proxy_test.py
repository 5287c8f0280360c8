"""deploy/nginx.conf and deploy/Caddyfile in front of the server, with Debian's nginx and Caddy: TLS, streams as they come,
bodies up to our own limit."""
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from debian import DEPLOY, sh

NAME = "llm.example.org"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def nginx(folder, port, server_port):
    """Its command with the example's site in a configuration of the test's own."""
    site = (DEPLOY / "nginx.conf").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{server_port}").replace(f"/etc/ssl/{NAME}", str(folder))
    site = site.replace("listen [::]:443 ssl http2;", "").replace("listen 443", f"listen 127.0.0.1:{port}")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(f"pid {folder}/nginx.pid;\nerror_log {folder}/error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{site}}}\n")
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    said = sh(program, "-t", "-c", folder / "nginx.conf")
    assert "warn" not in said, said
    return [program, "-c", folder / "nginx.conf", "-g", "daemon off; user root;"]


def caddy(folder, port, server_port):
    site = (DEPLOY / "Caddyfile").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{server_port}")
    site = site.replace(f"\n{NAME} {{", f"\n{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{NAME}:{port} {{\n\tbind 127.0.0.1\n\ttls {folder}/fullchain.pem {folder}/privkey.pem")
    (folder / "Caddyfile").write_text(site)
    sh("caddy", "validate", "--config", folder / "Caddyfile", "--adapter", "caddyfile")
    return ["caddy", "run", "--config", folder / "Caddyfile", "--adapter", "caddyfile"]


@pytest.fixture(params=[nginx, caddy], ids=lambda proxy: proxy.__name__)
def proxied(request, start_server, tmp_path):
    """The server, a proxy before it by the example's lines, and the port of its TLS."""
    server = start_server("--allowed-host", NAME, "--access-log", tmp_path / "access.jsonl")
    sh("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", tmp_path / "privkey.pem", "-out", tmp_path / "fullchain.pem")
    server.tls_port = free_port()
    server.proxy, server.certificate, server.log = request.param.__name__, tmp_path / "fullchain.pem", tmp_path / "access.jsonl"
    process = subprocess.Popen(request.param(tmp_path, server.tls_port, server.port))
    end = time.monotonic() + 30
    while curl(server, "/health")[0] != 200:
        assert time.monotonic() < end and process.poll() is None, "no answer through the proxy"
        time.sleep(0.1)
    yield server
    process.terminate()
    process.wait(timeout=30)


def curl(server, path, *flags, stdin=None):
    """The status and the body."""
    done = subprocess.run(["curl", "-s", "--cacert", server.certificate, "--resolve", f"{NAME}:{server.tls_port}:127.0.0.1", "-w", "\n%{http_code} %{http_version}", *flags, f"https://{NAME}:{server.tls_port}{path}"], input=stdin, capture_output=True, timeout=120)
    body, _, tail = done.stdout.decode().rpartition("\n")
    status, version = tail.split()
    return int(status), body, version


def connect(server):
    context = ssl.create_default_context(cafile=server.certificate)
    return context.wrap_socket(socket.create_connection(("127.0.0.1", server.tls_port), timeout=60), server_hostname=NAME)


def post(body):
    return f"POST /v1/completions HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


LONG = json.dumps({"prompt": "And it came to pass", "temperature": 0, "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()


def test_an_answer_in_either_protocol(proxied):
    ask = json.dumps({"messages": [{"role": "user", "content": "What is the capital of Norway?"}], "temperature": 0})
    for flag, version in (("--http1.1", "1.1"), ("--http2", "2")):
        status, body, used = curl(proxied, "/v1/chat/completions", flag, "-H", "content-type: application/json", "-d", ask)
        assert (status, used) == (200, version) and json.loads(body)["choices"][0]["message"]["content"] == "The capital of Norway is Oslo."
    if proxied.proxy == "caddy":
        return
    ids = [json.loads(line)["id"] for line in proxied.log.read_text().splitlines()]
    assert len(set(ids)) == 2 and all(len(i) == 32 for i in ids), "nginx's request id is in the access log"


def test_tokens_come_as_they_are_made(proxied):
    with connect(proxied) as s:
        s.sendall(post(LONG))
        arrivals = []
        while data := s.recv(65536):
            arrivals.append(time.monotonic())
            if b"[DONE]" in data:
                break
    assert len(arrivals) > 100, "buffered: it came in a few large pieces"
    assert arrivals[len(arrivals) // 2] - arrivals[0] > 0.25 * (arrivals[-1] - arrivals[0]) > 0


def wait_for_running(server, count):
    end = time.monotonic() + 5
    while server.request("GET", "/health")[2]["running"] != count:
        assert time.monotonic() < end, f"not {count} run"
        time.sleep(0.01)


def test_a_client_that_leaves_ends_its_request(proxied):
    s = connect(proxied)
    s.sendall(post(LONG.replace(b"1500", b"4000")))
    assert s.recv(1000)
    wait_for_running(proxied, 1)  # counted when the step ends that made the first token
    s.close()
    wait_for_running(proxied, 0)
    assert json.loads(proxied.log.read_text().splitlines()[-1])["finish"] == "cancelled"


def test_our_limit_of_a_body_is_the_proxys(proxied, tmp_path):
    (tmp_path / "large").write_bytes(b" " * (32 << 20))
    def status(path):
        return curl(proxied, "/v1/chat/completions", "-H", "content-type: application/json", "-H", "expect:", "--data-binary", f"@{path}")
    code, body, _ = status(tmp_path / "large")
    assert code in (400, 413) and json.loads(body)["error"], "up to the limit it is the server that refuses"
    (tmp_path / "larger").write_bytes(b" " * ((32 << 20) + 1))
    code, body, _ = status(tmp_path / "larger")
    assert code == 413
    if proxied.proxy == "nginx":
        assert "nginx" in body, "and beyond it the proxy, before it connects"
    assert curl(proxied, "/health")[0] == 200


def test_many_streams_share_the_proxy(proxied):
    texts = [None] * 12
    def ask(i):
        texts[i] = curl(proxied, "/v1/completions", "-N", "-H", "content-type: application/json", "-d", LONG.decode().replace("1500", "40"))[1]
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(text.rstrip().endswith("data: [DONE]") for text in texts)
