"""A server under load: pictures by eight clients against one at a time, mixed traffic, and memory over many requests.

python benchmarks/serve.py [MODEL] [--clients 8] [--rounds 3]
python benchmarks/serve.py [MODEL] --flat 5000
python benchmarks/serve.py [MODEL] --half-open 2000

Two servers, with and without batching, run in processes of their own and are measured in turns. ``--flat`` sends that
many small requests of all kinds and reports lost answers and memory. ``--half-open`` opens that many connections, sends
half a header on each, and reports how long a probe and a request take meanwhile.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import re
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

import httpx
import PIL.Image
from common import finish

DRAW = {"prompt": "a red circle left of a blue star", "steps": 20, "size": "64x64"}


@contextmanager
def server(model: str, slots: int):
    """A server in a process of its own, as an HTTP client."""
    command = [sys.executable, "-m", "diptych", "serve", model, "--port", "0", "--slots", slots, "--quiet"]
    process = subprocess.Popen([*map(str, command), "--timeout", "600"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = process.stdout.readline().split()[2]
        with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as http:
            http.post("/v1/images/generations", json=DRAW | {"n": 2}).raise_for_status()
            yield http
    finally:
        process.terminate()
        process.wait(60)


def picture() -> bytes:
    out = io.BytesIO()
    image = PIL.Image.new("RGB", (64, 64), "white")
    image.paste("red", (8, 8, 28, 28))
    image.save(out, "PNG")
    return out.getvalue()


PNG = picture()
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


def generate(http: httpx.Client, i: int, **how) -> tuple[float, bool]:
    """(seconds until the first preview or picture, whether all went well)."""
    return streamed(http, "/v1/images/generations", json=DRAW | {"seed": i, "stream": True, "partial_images": 1} | how)


def plain(http: httpx.Client, i: int) -> tuple[float, bool]:
    """A picture without previews."""
    return generate(http, i, partial_images=0)


def edit(http: httpx.Client, i: int) -> tuple[float, bool]:
    fields = {"prompt": "make the square blue", "steps": 20, "seed": i, "stream": "true", "partial_images": 1}
    return streamed(http, "/v1/images/edits", data=fields, files={"image": ("a.png", PNG)})


def chat(http: httpx.Client, i: int, **how) -> tuple[float, bool]:
    parts = [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "text", "text": "what is there in the picture?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": 24, "temperature": 1.0}
    return streamed(http, "/v1/chat/completions", json=body | {"seed": i} | how)


def streamed(http: httpx.Client, path: str, **how) -> tuple[float, bool]:
    start, first, well = time.perf_counter(), float("nan"), False
    with http.stream("POST", path, **how) as answer:
        for line in answer.iter_lines():
            if (
                line.startswith("data: ")
                and "b64_json" in line
                or '"content": "' in line
                and '"content": ""' not in line
            ):
                first = first if first == first else time.perf_counter() - start
            well = well or ".completed" in line or "[DONE]" in line
    return first, well and answer.status_code == 200


def load(http: httpx.Client, kinds: list, clients: int) -> dict:
    """Measurements of ``clients`` clients that send these requests as fast as they are answered."""

    def one(item) -> tuple[str, float, float, bool]:
        i, kind = item
        start = time.perf_counter()
        first, well = kind(http, i)
        return kind.__name__, time.perf_counter() - start, first, well

    start, cpu = time.perf_counter(), measure(http, "cpu_seconds_total")
    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(one, enumerate(kinds)))
    seconds, cpu = time.perf_counter() - start, measure(http, "cpu_seconds_total") - cpu
    took = sorted(d[1] for d in done)

    def first(*names: str) -> float:
        return median([d[2] for d in done if d[0] in names] or [float("nan")])

    at = {f"p{p}": took[min(len(took) - 1, len(took) * p // 100)] for p in (50, 95, 99)}
    good = sum(d[3] for d in done)
    firsts = {"first token": first("chat"), "first preview": first("generate", "edit")}
    counted = {"requests": len(done), "failed": len(done) - good}
    return counted | {"good a second": good / seconds, "CPU s each": cpu / len(done)} | at | firsts


def measure(http: httpx.Client, name: str) -> float:
    """One of the server's own measures of its process."""
    found = re.search(rf"^process_{name} (\S+)", http.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def memory(http: httpx.Client) -> float:
    """MiB that the server holds."""
    return measure(http, "resident_memory_bytes") / 2**20


def flat(http: httpx.Client, requests: int, clients: int) -> None:
    """Lost answers and memory over many small requests: pictures, chats, edits, chats about a picture as a stream,
    uploads, bad requests, and clients that leave in the middle of a stream."""
    ask = {"messages": [{"role": "user", "content": "what is a circle?"}], "max_tokens": 2}
    edits = {"data": {"prompt": "red", "steps": 1}, "files": {"image": ("a.png", PNG)}}

    def stored() -> bool:
        key = http.post("/v1/files", files={"file": ("a.png", PNG)}).json()["id"]
        read = http.get(f"/v1/files/{key}/content").status_code == 200
        return read and http.delete(f"/v1/files/{key}").json()["deleted"]

    def left() -> bool:
        with http.stream("POST", "/v1/images/generations", json=DRAW | {"stream": True}) as answer:
            return answer.status_code == 200 and next(answer.iter_lines()) == ": in line"

    kinds = [
        lambda i: generate(http, i, steps=1, partial_images=0)[1],
        lambda i: http.post("/v1/chat/completions", json=ask).status_code == 200,
        lambda i: http.post("/v1/images/edits", **edits).status_code == 200,
        lambda i: chat(http, i, max_tokens=2)[1],
        lambda i: stored(),
        lambda i: http.post("/v1/chat/completions", json=ask | {"n": 0}).status_code == 400,
        lambda i: http.post("/v1/images/generations", json=DRAW | {"steps": 1, "seed": i}).status_code == 200,
        lambda i: left(),
    ]
    errors: list[str] = []

    def small(i: int) -> bool:
        try:
            return kinds[i % len(kinds)](i)
        except httpx.HTTPError as error:  # an answer that did not come, or not whole
            errors.append(repr(error))
            return False

    rows, lost, start = [], 0, time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for at in range(0, requests, max(1, requests // 10)):
            part = range(at, min(requests, at + max(1, requests // 10)))
            lost += sum(not well for well in pool.map(small, part))
            rows.append({"requests": part.stop, "MiB": memory(http), "lost": lost})
    seconds = time.perf_counter() - start
    grown = rows[-1]["MiB"] - rows[0]["MiB"]
    print(*errors[:5], sep="\n", file=sys.stderr)
    finish("serve, memory", rows, seconds=seconds, grown_MiB=grown, lost=lost, a_second=requests / seconds)
    if lost:
        sys.exit(f"{lost} of {requests} requests were lost")


def half_open(http: httpx.Client, connections: int) -> None:
    """How long probes and requests take while others hold connections half open, and whether those end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, connections + 200)), hard))
    address = (http.base_url.host, http.base_url.port)
    body = {"messages": [{"role": "user", "content": "what is a circle?"}], "max_tokens": 2}
    rows, held = [], []
    try:
        for _ in range(connections):
            held.append(socket.create_connection(address, 60))
            held[-1].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-le")
        for at in range(20):
            row: dict = {"second": at}
            for name, path in (("health", "/health"), ("ready", "/ready"), ("chat", "/v1/chat/completions")):
                start = time.perf_counter()
                with httpx.Client(base_url=http.base_url, timeout=60) as fresh:  # a connection of its own
                    answer = fresh.post(path, json=body) if name == "chat" else fresh.get(path)
                row |= {f"{name} s": time.perf_counter() - start, f"{name} status": answer.status_code}
            rows.append(row | {"open": measure(http, "open_fds")})
            time.sleep(1)
    finally:
        for one in held:
            one.close()
    good = all(row[f"{name} status"] == 200 for row in rows for name in ("health", "ready", "chat"))
    worst = max(row["health s"] for row in rows)
    finish("serve, half-open", rows, connections=connections, all_answered=good, worst_health_s=worst)
    if not good:
        sys.exit("a probe or a request was not answered")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="bagel/tiny")
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--each", type=int, default=16, help="requests of a round (default: 16)")
    p.add_argument("--flat", type=int, help="send this many small requests; report lost answers and memory")
    p.add_argument("--half-open", type=int, help="hold this many connections half open; report how probes fare")
    a = p.parse_args()
    if a.flat:
        with server(a.model, 16) as http:
            flat(http, a.flat, a.clients)
        return
    if a.half_open:
        with server(a.model, 16) as http:
            half_open(http, a.half_open)
        return
    mixed = [chat, generate, edit, chat] * (a.each // 4)
    random.Random(0).shuffle(mixed)
    traffics = {"pictures": [plain] * a.each, "mixed": mixed}
    rounds: dict[tuple[str, str], list[dict]] = {}
    with server(a.model, 16) as together, server(a.model, 1) as alone:
        for _ in range(a.rounds):
            for traffic, kinds in traffics.items():
                for arm, http, clients in (
                    ("one client, one at a time", alone, 1),
                    (f"{a.clients} clients, one at a time", alone, a.clients),
                    (f"{a.clients} clients, continuous batching", together, a.clients),
                ):
                    found = load(http, kinds, clients)
                    rounds.setdefault((traffic, arm), []).append(found)
                    print(f"{traffic}, {arm}: {found['good a second']:.2f} a second", file=sys.stderr, flush=True)
    rows = []
    for (traffic, arm), found in rounds.items():
        best = max(found, key=lambda r: r["good a second"])
        rows.append({"traffic": traffic, "arm": arm} | best | {"failed": sum(r["failed"] for r in found)})
    speed = [r["good a second"] for r in rows]
    ratios = [[r["good a second"] for r in rounds[key]] for key in rounds]
    paired = [c / a for a, c in zip(ratios[0], ratios[2], strict=True)]
    cost = [r["CPU s each"] for r in rows]  # says the same where other programs compete for the cores
    finish(
        "serve",
        rows,
        clients=a.clients,
        image_speedup=speed[2] / speed[0],
        image_speedup_by_round=paired,
        image_speedup_in_cpu_seconds=cost[0] / cost[2],
        mixed_speedup=speed[5] / speed[3],
    )


if __name__ == "__main__":
    main()
