"""A server that says what a test wants of it: the page's files as the program serves them, everything else scripted."""
import http.server
import json
import random
import threading
import time


def stats(**changes):
    """GET /v1/stats of a box with one card and a disk tier."""
    gib = 1 << 30
    whole = {
        "model": "scripted", "version": "0", "uptime_seconds": 4521.0, "state": "ready", "reason": "",
        "requests": {
            "running": 2, "waiting": 1,
            "active": [
                {"id": "req_a", "path": "/v1/chat/completions", "phase": "decode", "prompt_tokens": 1200, "cached_tokens": 640, "completion_tokens": 93, "seconds": 6.1},
                {"id": "req_b", "path": "/v1/messages", "phase": "prefill", "prompt_tokens": 48000, "cached_tokens": 16384, "completion_tokens": 0, "seconds": 21.4},
                {"id": "req_c", "path": "/v1/completions", "phase": "waiting", "prompt_tokens": 900, "cached_tokens": 0, "completion_tokens": 0, "seconds": 0.4}],
            "recent": [{"id": f"req_{i}", "path": "/v1/chat/completions", "status": 200 if i != 3 else 429, "finish": "stop" if i != 3 else "", "prompt_tokens": 812 + 13 * i, "cached_tokens": 512,
                        "completion_tokens": 120 + i, "queue_ms": 0.4, "ttft_ms": 412.0 + i, "tpot_ms": 61.2 if i != 3 else None, "total_ms": 7400.0, "age_seconds": 5.0 + 40 * i} for i in range(9)]},
        "tokens": {"prompt_total": 184223, "cached_total": 92000, "answer_total": 9321, "prompt_per_second": 412.0, "answer_per_second": 21.4},
        "latency": {"ttft_ms": {"p50": 412.0, "p95": 3870.0}, "tpot_ms": {"p50": 46.1, "p95": 71.9}},
        "kv": {"tokens_used": 71800, "tokens_total": 262144, "prefix_cached_tokens": 40960, "hit_rate": 0.5},
        "tiers": [
            {"tier": "gpu0", "capacity_bytes": 32 * gib, "parts": [{"kind": "weights", "bytes": 9 * gib}, {"kind": "experts", "bytes": 15 * gib, "used_bytes": 13 * gib}, {"kind": "kv", "bytes": 4 * gib, "used_bytes": 1 * gib}, {"kind": "workspace", "bytes": 2 * gib}]},
            {"tier": "ram", "capacity_bytes": 192 * gib, "parts": [{"kind": "experts", "bytes": 132 * gib}, {"kind": "kv", "bytes": 16 * gib, "used_bytes": 3 * gib}, {"kind": "prefix", "bytes": 4 * gib, "used_bytes": 3 * gib}]},
            {"tier": "nvme", "capacity_bytes": 64 * gib, "parts": [{"kind": "prefix", "bytes": 64 * gib, "used_bytes": 11 * gib}]}],
        "experts": {"hit_rate": 0.62, "gpu": 1180, "cpu": 9828, "slots": 1180, "slots_total": 1290, "installs_total": 3411},
        "speed": {"read_bytes_per_second": 61.5e9, "stream_bytes_per_second": 74e9, "share": 0.83},
        "forecast": {"steps": 9321, "measured_seconds": 431.0, "predicted_seconds": 412.0,
                     "phases": [{"phase": "attention", "measured_seconds": 92.0, "predicted_seconds": 88.0}, {"phase": "experts", "measured_seconds": 301.0, "predicted_seconds": 289.0}, {"phase": "head", "measured_seconds": 38.0, "predicted_seconds": 35.0}]}}
    return {**whole, **changes}


def experts(layers=43, count=256):
    """GET /v1/experts: use falls with the rank, the first eighth is on the card, the last of the last layers on disk."""
    rank = [random.Random(layer).sample(range(count), count) for layer in range(layers)]
    use = [[min(255, round(255 / (1 + 8 * r / count) ** 1.5)) for r in row] for row in rank]
    tiers = ["".join("g" if r < count // 8 else "n" if layer > 0.8 * layers and r > count // 2 else "c" for r in row) for layer, row in enumerate(rank)]
    return {"layers": layers, "experts": count, "first_layer": 0, "tiers": tiers, "use": use, "tokens": [[100 * layer + expert for expert in range(count)] for layer in range(layers)]}


PLAN = {"fits": True, "context": 32768,
        "decode": [{"batch": 1, "fits": True, "tokens_per_second": 21.4, "bottleneck": "experts from RAM"}, {"batch": 8, "fits": True, "tokens_per_second": 61.0, "bottleneck": "experts from RAM"}],
        "prefill": {"first_token_seconds": 41.0, "bottleneck": "experts over PCIe"}, "memory": [{"tier": "host", "owner": "routed experts", "bytes": 1 << 37}],
        "what_if": [{"change": "12 channels", "fits": True, "decode_percent": 80.0, "prefill_percent": 0.0}]}


class ScriptedBox:
    """`source`: a program.Server whose page it shows. Its attributes are its script, and can be changed while it runs."""

    def __init__(self, source):
        self.files = {}
        self.source = source
        self.key = None
        self.health = (200, {"status": "ok"})
        self.stats = stats()
        self.streams = True  # whether it knows /v1/stats?stream=1
        self.experts = experts()
        self.plan = PLAN
        self.answer = [{"content": "Hello"}]  # deltas, or seconds to wait, or an error's message, or how far the prompt is
        self.usage = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
        self.bodies = []  # of chats
        self.keys = []  # that came with chats
        self.watchers = 0  # of statistics, just now
        self.httpd = None
        self.port = 0
        self.start()

    @property
    def origin(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """On the same port as before, if it was stopped."""
        box = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                box.get(self, *self.path.split("?"))

            def do_POST(self):
                box.chat(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def log_message(self, *_):
                pass

        http.server.ThreadingHTTPServer.allow_reuse_address = True
        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.httpd.daemon_threads = True
        self.port = self.httpd.server_port
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self):
        if self.httpd:
            self.httpd.shutdown()
            self.httpd.server_close()
        self.httpd = None

    def get(self, handler, path, query=""):
        if path == "/" or path.startswith("/page/"):
            if path not in self.files:
                self.files[path] = self.source.request("GET", path)
            status, headers, body = self.files[path]
            return self.send(handler, status, body.encode(), {n: v for n, v in headers.items() if n.lower() not in ("content-length", "connection", "date")})
        if path == "/health":
            return self.json(handler, *self.health)
        if not self.allowed(handler):
            return None
        if path == "/v1/stats" and query == "stream=1" and self.stats and self.streams:
            return self.stream_stats(handler)
        found = {"/v1/stats": self.stats, "/v1/experts": self.experts, "/v1/plan": self.plan, "/v1/models": {"data": [{"id": "scripted"}]}, "/version": {"version": "7.8.9"}}.get(path)
        return self.json(handler, 200, found) if found else self.json(handler, 404, {"error": {"message": "there is no " + path}})

    def stream_stats(self, handler):
        httpd = self.httpd
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        self.watchers += 1
        try:
            while self.httpd is httpd:
                handler.wfile.write(f"data: {json.dumps(self.stats)}\n\n".encode())
                time.sleep(0.2)
        except OSError:
            pass  # nobody looks any more
        finally:
            self.watchers -= 1

    def allowed(self, handler):
        if self.key is None or handler.headers.get("authorization") == f"Bearer {self.key}":
            return True
        self.json(handler, 401, {"error": {"message": "this server wants an API key", "type": "authentication_error"}})
        return False

    def chat(self, handler, body):
        self.bodies.append(body)
        self.keys.append(handler.headers.get("authorization"))
        if not self.allowed(handler):
            return
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()

        def event(data):
            handler.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
            handler.wfile.flush()

        try:
            for piece in self.answer:
                if isinstance(piece, (int, float)):
                    time.sleep(piece)
                elif isinstance(piece, str):
                    return event({"error": {"message": piece}})
                elif "prompt_progress" in piece:
                    event({"choices": [], **piece})
                else:
                    event({"choices": [{"index": 0, "delta": piece, "finish_reason": None}]})
            event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if "tool_calls" in self.answer[-1] else "stop"}]})
            event({"choices": [], "usage": self.usage})
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # the page has stopped

    def json(self, handler, status, body):
        self.send(handler, status, json.dumps(body).encode(), {"content-type": "application/json"})

    def send(self, handler, status, body, headers):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
