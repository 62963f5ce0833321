"""A chat-completions endpoint for tests, as a process of its own, whose faults are written into the questions.

A question that contains `[[500 words 7]]` is met with these in turn, the last one again and again:

| word | what comes back |
|---|---|
| a number | a chat completion with this text |
| `say:TEXT` | a chat completion with TEXT, where `_` stands for a blank and `~` for nothing at all |
| `cut:TEXT` | the same, stopped by the token limit |
| `slow:TEXT` | the same after 30 ms |
| `words` | a chat completion that is no number |
| `hang` | nothing |
| `drip` | a good completion, one byte every 50 ms |
| `garbage`, `html`, `list`, `null`, `part` | no chat completion; one without text; half of one |
| `echo` | a chat completion that repeats the request's Authorization header |
| `broken` | fewer bytes than announced, then the connection is closed |
| `gone` | the connection is closed without a word |
| `429:SECONDS` | too many requests, with Retry-After (`429:` without); a date with `_` for blanks will do |
| `quota` | 429 because the account is empty |
| any other status, `500` | an error that repeats the request's Authorization header; `503:SECONDS` with Retry-After |

`GET /log` gives every request so far: time, question, body, and the largest number that were open at once.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.request import urlopen

PLAN = re.compile(r"\[\[(.*?)\]\]")
SAYS = ("say", "cut", "slow")
DRIP = 0.05  # seconds


def completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: ClassVar = Counter()
    log: ClassVar = []
    lock = threading.Lock()
    open_now = most_open = 0

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send(200, json.dumps({"requests": Handler.log, "most_open": Handler.most_open}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        plan = (PLAN.search(prompt) or [None, "5"])[1].split()
        with Handler.lock:
            turn = Handler.seen[prompt]
            Handler.seen[prompt] += 1
            Handler.log.append({"time": time.monotonic(), "path": self.path, "body": body})
            Handler.open_now += 1
            Handler.most_open = max(Handler.most_open, Handler.open_now)
        try:
            self.act(plan[min(turn, len(plan) - 1)])
        except OSError:  # the client went away
            self.close_connection = True
        finally:
            with Handler.lock:
                Handler.open_now -= 1

    def act(self, word):
        word, _, argument = word.partition(":")
        text = argument.replace("_", " ").replace("~", "")
        good = json.dumps(completion("7"))
        if re.fullmatch(r"\d{3}", word):
            headers = {"Retry-After": text} if argument else {}
            said = f"no, {self.headers['Authorization']}"
            return self.send(int(word), json.dumps({"error": {"message": said, "code": None}}), headers)
        if word == "hang":
            time.sleep(20)
            self.close_connection = True
            return None
        if word == "gone":
            self.close_connection = True
            return None
        if word == "broken":
            self.close_connection = True
            return self.send(200, good[:40], {"Content-Length": str(len(good))})
        if word == "drip":
            self.send(200, "", {"Content-Length": str(len(good))})
            for byte in good.encode():
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(DRIP)
            return None
        if word == "slow":
            time.sleep(0.03)
        body = {
            "echo": json.dumps(completion(self.headers["Authorization"])),
            "garbage": "\x00\x01{]",
            "html": "<html>Welcome</html>",
            "list": "[7]",
            "null": json.dumps(completion(None)),
            "part": good[: len(good) // 2],
            "words": json.dumps(completion("I would say it is rather high.")),
        }
        if word == "quota":
            error = {"message": "You have used everything", "code": "insufficient_quota"}
            return self.send(429, json.dumps({"error": error}))
        if word in body:
            return self.send(200, body[word])
        cut = "length" if word == "cut" else "stop"
        return self.send(200, json.dumps(completion(text if word in SAYS else word, cut)))

    def send(self, status, body, headers=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(body.encode())), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())
        self.wfile.flush()


class Server:
    """What tests know of a running server."""

    def __init__(self, process):
        self.process, port = process, int(process.stdout.readline())
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def log(self):
        with urlopen(f"{self.root}/log", timeout=5) as response:
            return json.load(response)

    def quit(self):
        self.process.kill()
        self.process.wait()

    def bodies(self):
        return [request["body"] for request in self.log()["requests"]]

    def asked(self, marker=""):
        """How many requests had a question with `marker`."""
        return sum(marker in body["messages"][0]["content"] for body in self.bodies())


def make_client_quick(monkeypatch):
    """Let the `openai` client wait hundredths of seconds, not seconds, before it asks again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.1)


@contextmanager
def judge_server():
    """A server for a `with` block, on a port that the system chooses."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()
