"""Requests per minute and time to the first token of a running OpenAI-compatible server, this package's or another.

    python tools/server_speed.py http://localhost:8000/v1 prompts.jsonl --clients 1 4 --requests 24

Each line of the file is {"prompt": "a question"} or {"prompt": {"user": "a question"}}. All clients stream greedy
answers. The time to the first token includes waiting for other clients. The report is one line of JSON per number of
clients.
"""

import argparse
import json
import os
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def ask(url: str, question: str, max_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first piece of text, seconds to the end, and the number of new tokens, if the server counts."""
    content = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
    body = json.dumps(content | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
    }
    started, first, tokens = time.perf_counter(), None, 0
    with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body, headers)) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - started
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    seconds = time.perf_counter() - started
    return first or seconds, seconds, tokens


def measure(url: str, questions: list[str], clients: int, requests: int, max_tokens: int) -> dict[str, Any]:
    asked = [questions[i % len(questions)] for i in range(requests)]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda question: ask(url, question, max_tokens), asked))
    seconds = time.perf_counter() - started
    first, whole, tokens = zip(*answers, strict=True)
    return {
        "clients": clients,
        "requests": requests,
        "requests_per_minute": round(60 * requests / seconds, 1),
        "first_token_s": round(statistics.median(first), 3),
        "answer_s": round(statistics.median(whole), 3),
        "tokens_per_second": round(sum(tokens) / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as http://localhost:8000/v1")
    parser.add_argument("prompts", type=Path, help="a JSONL file")
    parser.add_argument("--clients", type=int, nargs="+", default=[1])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
    questions = [prompt if isinstance(prompt, str) else prompt["user"] for prompt in prompts]
    ask(args.url, questions[0], args.max_tokens)  # warm-up
    for clients in args.clients:
        print(json.dumps(measure(args.url, questions, clients, args.requests, args.max_tokens)), flush=True)


if __name__ == "__main__":
    main()
