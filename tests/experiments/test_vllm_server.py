"""The server of `vllm_speed`, with a small one in place of vLLM's."""

import sys

import pytest

from experiments.speed import vllm_jobs, vllm_server, vllm_speed

ANSWERS = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = " ".join([asked["prompt"]] * asked["max_tokens"]) + " \\n\\nend"
        said = {"choices": [{"text": text}], "usage": {"completion_tokens": asked["max_tokens"]}}
        self.send_response(int(sys.argv[2]))
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())
print("GPU KV cache size: 1,024 tokens", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
JOB = {"head": {"part": "serve"}, "folder": "model", "prompt": "a", "tokens": 2}


def server(monkeypatch, tmp_path, *arguments):
    """A server whose process runs these arguments; "PORT" is its port."""

    def command(job, port):
        return [sys.executable, "-c", *(str(port) if x == "PORT" else x for x in arguments)]

    monkeypatch.setattr(vllm_server, "command", command)
    return vllm_server.Server(tmp_path, "serve", JOB)


def test_a_row_is_what_the_server_said_and_answered(monkeypatch, tmp_path):
    own = server(monkeypatch, tmp_path, ANSWERS, "PORT", "200")
    (row,) = own.rows(30.0)
    assert row.pop("start_seconds") > 0 and row.pop("seconds") >= 0
    assert row == {"part": "serve", "kv_tokens": 1024, "tokens": 2, "answer": "a a end"}
    assert own.process.poll() is not None


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (("raise SystemExit(3)",), "ended with 3"),
        (("import time; time.sleep(60)",), "not up after 1 s"),
        ((ANSWERS, "PORT", "500"), "no answer: HTTP Error 500: Internal Server Error"),
    ],
)
def test_a_server_without_an_answer_has_a_note(monkeypatch, tmp_path, arguments, note):
    own = server(monkeypatch, tmp_path, *arguments)
    assert own.rows(1.0 if "not up" in note else 30.0) == [{"part": "serve", "note": note}]
    assert own.process.poll() is not None


def test_the_command_is_the_documented_one(tmp_path):
    config = vllm_speed.Config(folder="model", parts=("serve",), bits=(4,))
    plain, compiled = vllm_jobs.jobs_of(config, tmp_path).values()
    words = " ".join(vllm_server.command(compiled, 8000))
    documented = "serve model --attention-backend CUSTOM"
    assert documented in words and "--block-size 64" in words
    assert '--additional-config {"turboquant": {"bits": 4}}' in words
    assert '--compilation-config {"cudagraph_capture_sizes": [1, 2, 4]}' in words
    assert "--port 8000" in words
    assert '"mode": 0' in " ".join(vllm_server.command(plain, 8000))
