"""Hundreds of requests at once on the demo model, with random lengths, priorities, cancels and disconnects: every answer
is the one it has alone, nobody starves, and in the end nothing is left. TC_SOAK_SECONDS says how long each (default: the
smoke of a test run; 36 in CI, 600 for the tests with the mark long)."""
import asyncio
import os
import random
import time

import openai
import pytest

from program import SLOW

SECONDS = float(os.environ.get("TC_SOAK_SECONDS", "20"))
# What a client does, and how often.
MIXED = {"streamed": 0.4, "plain": 0.3, "streamed and left": 0.2, "plain and left": 0.1}
STREAMS = {"streamed": 0.8, "streamed and left": 0.2}
QUESTIONS = ["What is the capital of Norway?", "Tell me a story about a fox.", "What is 3 + 4?", "What is the opposite of hot?",
             "What is a thermocline?", "Tell me a story about a bear and a bird.", "What is the capital of Peru?", "Who are you?"]


def catalogue(most):
    """Requests of every kind, as arguments of chat.completions.create, with answers of at most `most` tokens."""
    requests = []
    for i, question in enumerate(QUESTIONS * 3):
        r = {"model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": min(most, 6 + 5 * (i % 9))}
        if i >= len(QUESTIONS):
            r |= {"temperature": 0.9, "seed": 100 + i, "top_p": 0.95}
        else:
            r |= {"temperature": 0}
        extra = {"priority": i % 3}
        if i % 5 == 4:
            r |= {"logprobs": True, "top_logprobs": 2}
        if i % 7 == 6:
            extra["thinking"] = {"type": "enabled"}
        if i % 11 == 10:
            r |= {"n": 2}
        requests.append(r | {"extra_body": extra})
    return requests


def text_of(choice):
    message = choice.message if hasattr(choice, "message") else choice.delta
    return ((message.model_extra or {}).get("reasoning_content") or "") + "|" + (message.content or "")


async def plain(client, request):
    answer = await client.chat.completions.create(**request)
    return [(text_of(c), c.finish_reason) for c in answer.choices]


async def streamed(client, request, leave_after=None, gaps=None):
    """The answer from its events, the seconds between those of a choice into `gaps`; after `leave_after` of them the client goes away,
    and None comes back."""
    n = request.get("n", 1)
    reasoning, content, reasons = [""] * n, [""] * n, [None] * n
    count, last = 0, {}
    stream = await client.chat.completions.create(**request, stream=True)
    async for chunk in stream:
        count += 1
        now = time.monotonic()
        for choice in chunk.choices:
            if gaps is not None and choice.index in last:
                gaps.append(now - last[choice.index])
            last[choice.index] = now
        if leave_after is not None and count > leave_after:
            await stream.close()
            return None
        for choice in chunk.choices:
            reasoning[choice.index] += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            content[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return [(f"{r}|{c}", reason) for r, c, reason in zip(reasoning, content, reasons)]


def held(pid):
    """What a server may leak besides memory."""
    return {"descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task"))}


def resident_mib(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


async def soak(server, clients, requests, kinds):
    """`clients` at once for SECONDS, each with one request of these kinds after the other."""
    rng = random.Random(1)
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=600) as client:
        alone = [await plain(client, r) for r in requests]
        before, quiet = resident_mib(server.process.pid), held(server.process.pid)
        gaps = []
        end = time.monotonic() + SECONDS
        done = [0] * clients
        left = 0

        async def one(index, seed):
            nonlocal left
            mine = random.Random(seed)
            while time.monotonic() < end:
                i = mine.randrange(len(requests))
                kind = mine.choices(list(kinds), kinds.values())[0]
                if kind == "streamed and left":
                    if await streamed(client, requests[i], mine.randrange(8), gaps) is None:
                        left += 1
                elif kind == "plain and left":
                    task = asyncio.ensure_future(plain(client, requests[i]))
                    await asyncio.sleep(mine.random() * 0.05)
                    task.cancel()
                    left += 1
                elif kind == "streamed":
                    assert await streamed(client, requests[i], gaps=gaps) == alone[i], (i, requests[i])
                else:
                    assert await plain(client, requests[i]) == alone[i], (i, requests[i])
                done[index] += 1

        await asyncio.gather(*(one(i, rng.random()) for i in range(clients)))
    gaps.sort()
    stall = {f"p{100 * share:g}_ms": round(1e3 * gaps[int(share * (len(gaps) - 1))], 1) for share in (0.5, 0.99, 1)}
    return {"requests": sum(done), "fewest": min(done), "left": left, "events": len(gaps), "between events": stall, "quiet": quiet,
            "grew_mib": resident_mib(server.process.pid) - before}


def rests(server):
    """What /health says once nobody asks any more."""
    for _ in range(600):
        status, _, body = server.request("GET", "/health")
        if status == 200 and body["running"] == 0 and body["waiting"] == 0:
            return body
        time.sleep(0.1)
    raise AssertionError(f"requests are left: {body}")


def check(server, result):
    print(result)
    assert result["fewest"] > 0, "somebody starved"
    assert rests(server)["kv_tokens_used"] == 0
    assert result["grew_mib"] < (512 if SLOW else 64), result  # ASan keeps what is freed for a while
    now = held(server.process.pid)
    assert now["descriptors"] <= result["quiet"]["descriptors"] and now["threads"] <= result["quiet"]["threads"] + 2, now
    server.stop()


@pytest.mark.parametrize("flags, clients, requests", [
    (["--device", "none", "--max-num-seqs", "16", "--max-model-len", "1024", "--no-prefix-cache"], 32, catalogue(50)),
    (["--device", "none", "--max-num-seqs", "16", "--max-model-len", "1024", "--prefix-cache-memory", "8MiB"], 32, catalogue(50)),
    (["--device", "none", "--max-num-seqs", "6", "--max-model-len", "512", "--max-num-batched-tokens", "128", "--kv-host-memory", "13668KiB", "--prefix-cache-memory", "8MiB", "--step-budget-ms", "20"], 24, catalogue(50)),
    (["--device", "simt", "--experts-on-gpu", "60", "--max-num-seqs", "4", "--max-model-len", "256"], 4, catalogue(4)[5:21:5]),  # interpreted: a token takes a third of a second
], ids=["cpu", "cpu-prefix-cache", "cpu-short-of-pages", "simt"])
def test_answers_are_those_of_a_quiet_server(start_server, flags, clients, requests):
    server = start_server(*flags, "--max-queue", "512")
    check(server, asyncio.run(soak(server, clients, requests, MIXED)))


@pytest.mark.long
def test_two_hundred_streams_of_which_one_in_five_leaves(start_server):
    server = start_server("--device", "none", "--max-num-seqs", "64", "--max-model-len", "512", "--max-queue", "512")
    check(server, asyncio.run(soak(server, 200, catalogue(50), STREAMS)))
