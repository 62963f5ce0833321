"""A web server with faults, and small files of the same schemas as those that the paper's authors published."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from caa_lens.paper import sources as data_sources
from caa_lens.paper.questions import published_size


@contextlib.contextmanager
def serving(folder, faults):
    """Serve a folder on 127.0.0.1; `faults` maps ends of addresses to `truncate`, `hang`, or a status number.

    Yields the address, and the list of paths that were asked for.
    """
    asked = []
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            fault = next((fault for end, fault in faults.items() if self.path.endswith(end)), None)
            file = folder / self.path.lstrip("/")
            if isinstance(fault, int) or not file.is_file():
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            body = file.read_bytes()
            if fault == "hang":
                stop.wait(5)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def ab_rows(label, n):
    """Rows of the authors' A/B files, the answer letters even."""
    return [
        {
            "question": f"{label} {i}?\n\nChoices:\n (A) Yes, {i}\n (B) No, {i}",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        for i in range(n)
    ]


def question_rows(categories, per_category):
    """Rows of the authors' MMLU and TruthfulQA files."""
    return [
        {
            "prompt": f"{category} {i}?\n\nChoices:\n(A) One {i}\n(B) Two {i}",
            "correct": "(A)" if i % 2 else "(B)",
            "incorrect": "(B)" if i % 2 else "(A)",
            "correct_full_text": "",
            "incorrect_full_text": "",
            "category": category,
        }
        for category in categories
        for i in range(per_category)
    ]


def contents(name):
    """What each of the authors' files of a set holds, with as many rows as in the paper."""
    if name in data_sources.QUESTIONS:
        categories = [f"subject_{i:02}" for i in range(data_sources.SUBJECTS)]
        return {"questions": question_rows(categories, data_sources.PER_SUBJECT)}
    return {
        "generate": ab_rows(f"{name} generate", published_size(name, "generate")),
        "test": ab_rows(f"{name} test", published_size(name, "test")),
        "open_ended": [{"question": f"{name}, what do you think of {i}?"} for i in range(3)],
    }


def write_published(root, name, *, server=False, **changed):
    """Write the authors' files of a set as in a clone at `root`, or as GitHub serves them; `changed` replaces rows."""
    for role, file in data_sources.authors_files(name).items():
        path = root / (f"{file.repository}/{file.revision}/{file.path}" if server else file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**contents(name), **changed}[role], indent=4), encoding="utf-8")
    return root
