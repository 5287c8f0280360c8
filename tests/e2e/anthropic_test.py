"""/v1/messages with the official anthropic client, and as Claude Code asks."""
import json
import time

import anthropic
import pytest

from anthropic_client import GREEDY, blocks_of, client_of, prompt_tokens, text_of

ASK = [{"role": "user", "content": "What is the capital of Norway?"}]
SUM = [{"role": "user", "content": "What is 3 + 4?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
OSLO = "The capital of Norway is Oslo."
TOOLS = [{"name": "get_weather", "description": "Weather of a city", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]
THINK = {"type": "enabled", "budget_tokens": 1024}
# What the model reads on from here has no end.
LONG = [{"role": "user", "content": "Read on."}, {"role": "assistant", "content": "And it came to pass"}]


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def create(client, messages, max_tokens=200, **fields):
    return client.messages.create(model="demo", max_tokens=max_tokens, messages=messages, extra_body=GREEDY, **fields)


def streamed(client, messages, max_tokens=200, **fields):
    """The message that the client puts together of a stream."""
    with client.messages.stream(model="demo", max_tokens=max_tokens, messages=messages, extra_body=GREEDY, **fields) as stream:
        return stream.get_final_message()


def events_of(client, messages, max_tokens=200, **fields):
    return list(client.messages.create(model="demo", max_tokens=max_tokens, messages=messages, extra_body=GREEDY, stream=True, **fields))


def shape(message):
    """What a message says, without the ids that are new in every answer."""
    blocks = [block.model_dump(include={"type", "text", "thinking", "signature", "name", "input"}) for block in message.content]
    return blocks, message.stop_reason, message.stop_sequence, message.usage.output_tokens, prompt_tokens(message.usage)


@pytest.mark.parametrize("messages, fields, kinds, reason", [
    (ASK, {}, ["text"], "end_turn"),
    (ASK, {"system": "Be brief."}, ["text"], "end_turn"),
    (SUM, {"thinking": THINK}, ["thinking", "text"], "end_turn"),
    (WEATHER, {"tools": TOOLS}, ["tool_use"], "tool_use"),
    (WEATHER, {"tools": TOOLS, "thinking": {"type": "adaptive"}}, ["thinking", "tool_use"], "tool_use"),
    (ASK, {"max_tokens": 2}, ["text"], "max_tokens"),
    (ASK, {"stop_sequences": ["Norway", "x y z"]}, ["text"], "stop_sequence"),
], ids=["text", "system", "thinking", "tool", "thinking_tool", "max_tokens", "stop"])
def test_plain_and_streamed_agree(client, messages, fields, kinds, reason):
    plain, stream = create(client, messages, **fields), streamed(client, messages, **fields)
    assert shape(plain) == shape(stream)
    assert [block.type for block in plain.content] == kinds and plain.stop_reason == reason
    assert plain.id.startswith("msg_") and plain.role == "assistant" and plain.type == "message"
    counted = client.messages.count_tokens(model="demo", messages=messages, **{k: v for k, v in fields.items() if k in ("system", "tools", "thinking")})
    for usage in (plain.usage, stream.usage):
        assert usage.input_tokens > 0 and prompt_tokens(usage) == counted.input_tokens
    assert stream.usage.input_tokens == 1, "the same prompt was just computed, and its last token always is"


def test_what_the_answers_are(client):
    assert text_of(create(client, ASK)) == OSLO
    short = create(client, ASK, max_tokens=2)
    assert short.usage.output_tokens == 2 and OSLO.startswith(text_of(short)) and text_of(short)
    stopped = create(client, ASK, stop_sequences=["Norway"])
    assert text_of(stopped) == "The capital of " and stopped.stop_sequence == "Norway"
    again = create(client, ASK + [{"role": "assistant", "content": "The capital of"}])
    assert text_of(again) == " Norway is Oslo.", "the last words of the assistant are gone on with"


DELTA_FIELD = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


@pytest.mark.parametrize("messages, fields", [(ASK, {}), (SUM, {"thinking": THINK}), (WEATHER, {"tools": TOOLS, "thinking": THINK})], ids=["text", "thinking", "tool"])
def test_events_come_in_order(client, messages, fields):
    events = events_of(client, messages, **fields)
    assert events[0].type == "message_start" and [e.type for e in events[-2:]] == ["message_delta", "message_stop"]
    start = events[0].message
    assert start.content == [] and start.stop_reason is None and prompt_tokens(start.usage) > 5 and start.usage.input_tokens > 0
    index, parts, types = -1, [], []
    for event in events[1:-2]:
        if event.type == "content_block_start":
            index += 1
            parts.append("")
            types.append(event.content_block.type)
            deltas = []
        assert event.index == index, "one block at a time, counted from 0"
        if event.type == "content_block_delta":
            deltas.append(event.delta.type)
            parts[-1] += getattr(event.delta, DELTA_FIELD.get(event.delta.type, ""), "")
        if event.type == "content_block_stop":
            allowed = {"text": {"text_delta"}, "thinking": {"thinking_delta", "signature_delta"}, "tool_use": {"input_json_delta"}}[types[-1]]
            assert deltas and set(deltas) == allowed
            assert types[-1] != "thinking" or deltas.index("signature_delta") == len(deltas) - 1
    plain = create(client, messages, **fields)
    assert types == [block.type for block in plain.content]
    for text, block in zip(parts, plain.content):
        said = {"text": lambda: block.text, "thinking": lambda: block.thinking, "tool_use": lambda: block.input}[block.type]()
        assert (json.loads(text) if block.type == "tool_use" else text) == said
    assert events[-2].usage.output_tokens == plain.usage.output_tokens and events[-2].delta.stop_reason == plain.stop_reason


def test_a_tool_is_called_and_its_result_read(client):
    called = create(client, WEATHER, tools=TOOLS, thinking=THINK)
    call = called.content[-1]
    assert call.name == "get_weather" and call.id.startswith("toolu_") and isinstance(call.input["city"], str)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}]}
    history = WEATHER + [{"role": "assistant", "content": blocks_of(called)}, result]
    answer = create(client, history, tools=TOOLS, thinking=THINK)
    assert answer.stop_reason == "end_turn" and text_of(answer)
    assert answer.usage.cache_read_input_tokens >= prompt_tokens(called.usage), "the call and what was thought before it are replayed as they were said"
    failed = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "is_error": True, "content": "no such city"}]}
    assert create(client, history[:-1] + [failed], tools=TOOLS).content


def test_thinking_is_replayed_whoever_signed_it(client):
    first = create(client, SUM, thinking=THINK)
    thought = first.content[0]
    assert thought.type == "thinking" and thought.thinking and thought.signature
    more = {"role": "user", "content": "And what is 2 + 2?"}
    own = SUM + [{"role": "assistant", "content": blocks_of(first)}, more]
    foreign = SUM + [{"role": "assistant", "content": [{"type": "thinking", "thinking": thought.thinking, "signature": "c2lnbmVkIGVsc2V3aGVyZQ=="}, {"type": "redacted_thinking", "data": "b3BhcXVl"}, *blocks_of(first)[1:]]}, more]
    assert shape(create(client, own, thinking=THINK)) == shape(create(client, foreign, thinking=THINK))


def test_errors_are_typed(client, start_server):
    with pytest.raises(anthropic.BadRequestError) as refused:
        create(client, [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x"}}]}])
    assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"] == "invalid_request_error"
    assert "messages[0].content[0]" in refused.value.body["error"]["message"] and refused.value.request_id == refused.value.body["request_id"]
    for bad in ({"max_tokens": 0}, {"thinking": {"type": "loud"}}, {"stop_sequences": "x"}, {"tools": [{"name": ""}]}, {"tool_choice": {"type": "any"}, "tools": TOOLS}):
        for send in (create, events_of):
            with pytest.raises(anthropic.BadRequestError) as refused:
                send(client, ASK, **bad)
            assert next(iter(bad)).split("[")[0] in str(refused.value)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: (at least )?\d+ tokens > \d+ maximum"):
        create(client, [{"role": "user", "content": "word " * 50_000}])
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.models.retrieve("no-such-model")
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError):
        client.post("/v1/messages/nothing", body={}, cast_to=object)
    keyed = start_server("--api-key", "open-sesame-open")
    for options in ({"api_key": "wrong"}, {"api_key": None, "auth_token": "wrong"}):
        with pytest.raises(anthropic.AuthenticationError) as stranger:
            create(client_of(keyed, **options), ASK)
        assert stranger.value.body["type"] == "error" and stranger.value.body["error"]["type"] == "authentication_error"
    for options in ({"api_key": "open-sesame-open"}, {"api_key": None, "auth_token": "open-sesame-open"}):
        assert text_of(create(client_of(keyed, **options), ASK)) == OSLO, "x-api-key and Bearer"
        assert client_of(keyed, **options).messages.count_tokens(model="demo", messages=ASK).input_tokens > 5
    keyed.stop()


def last_entry(server, log):
    """The access log's last line, once the server is idle again."""
    end = time.time() + 30
    while (health := server.request("GET", "/health")[2])["running"] or health["waiting"]:
        assert time.time() < end, "it goes on without its client"
        time.sleep(0.02)
    server.stop()
    return json.loads(log.read_text().splitlines()[-1])


def test_whoever_leaves_a_stream_ends_it(start_server, tmp_path):
    log = tmp_path / "access.jsonl"
    server = start_server("--access-log", log)
    with client_of(server).messages.create(model="demo", max_tokens=3900, messages=LONG, extra_body=GREEDY, stream=True) as stream:
        events = iter(stream)
        while next(events).type != "content_block_delta":
            pass
        while server.request("GET", "/health")[2]["running"] == 0:
            time.sleep(0.01)
    entry = last_entry(server, log)
    assert entry["finish"] == "cancelled" and 0 < entry["completion_tokens"] < 3900, entry


def test_whoever_runs_out_of_time_ends_it(start_server, tmp_path):
    log = tmp_path / "access.jsonl"
    server = start_server("--access-log", log)
    with pytest.raises(anthropic.APITimeoutError):
        create(client_of(server, timeout=0.3), LONG, max_tokens=3900)
    entry = last_entry(server, log)
    assert entry["finish"] == "cancelled" and entry["completion_tokens"] < 3900, entry


def claude_code(client, messages, nonce, **fields):
    """A request in the shape of Claude Code's: a beta path and header, a first system block that is new every time, and what this server has no use for."""
    system = [
        {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.200.{nonce}; cc_entrypoint=cli; cch={nonce};"},
        {"type": "text", "text": "You are a coding agent. " + "Use the tools that you have, and say what you did. " * 12, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": "The folder is /home/me/project.", "cache_control": {"type": "ephemeral"}},
    ]
    tools = [{**TOOLS[0], "eager_input_streaming": True, "cache_control": {"type": "ephemeral"}}, {"name": "lookup", "description": "Looks a word up", "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}}, "defer_loading": True}, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]
    with client.beta.messages.stream(
        model="claude-opus-4", max_tokens=120, messages=messages, system=system, tools=tools, betas=["claude-code-20250219", "interleaved-thinking-2025-05-14", "a-beta-of-tomorrow"],
        thinking={"type": "adaptive"}, metadata={"user_id": "user_0123"}, context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        extra_body={**GREEDY, "output_config": {"effort": "medium"}, "speed": None, "a_field_of_tomorrow": {"deep": [1]}}, **fields) as stream:
        return stream.get_final_message()


def test_claude_code_goes_on_from_what_was_said(client):
    turns = [{"role": "user", "content": [{"type": "text", "text": "<system-reminder>Mind the style.</system-reminder>"}, {"type": "text", "text": "What is the capital of Norway?", "cache_control": {"type": "ephemeral"}}]}]
    before = claude_code(client, turns, "0a1b2")
    assert before.content and before.model == "claude-opus-4"
    for nonce, more in (("77f31", [{"role": "user", "content": "What is the weather in Oslo?"}]), ("c0ffe", [{"role": "system", "content": "The user opened another file."}, {"role": "user", "content": "What is 3 + 4?"}])):
        answered = [block for block in blocks_of(before)]
        results = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "sunny"} for block in answered if block["type"] == "tool_use"]}]
        turns += [{"role": "assistant", "content": answered}] + (results if results[0]["content"] else []) + more
        answer = claude_code(client, turns, nonce)
        assert answer.usage.cache_read_input_tokens >= prompt_tokens(before.usage), "the billing line, new in every request, is no part of the prompt"
        assert answer.content
        before = answer


def test_the_wire_is_what_claude_code_sends(server):
    body = {"model": "x", "max_tokens": 20, "messages": ASK, "temperature": 0, "stream": True}
    for auth in ({"x-api-key": "k"}, {"authorization": "Bearer k"}, {"x-api-key": "k", "authorization": "Bearer k"}):
        headers = {"content-type": "application/json", "anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,oauth-2025-04-20", "anthropic-dangerous-direct-browser-access": "true", "x-app": "cli", **auth}
        status, got, text = server.request("POST", "/v1/messages?beta=true", body, headers)
        assert status == 200 and got["Content-Type"].startswith("text/event-stream") and got["request-id"]
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == OSLO
        assert "timings" not in text
        status, _, counted = server.request("POST", "/v1/messages/count_tokens?beta=true", {"model": "x", "messages": ASK}, headers)
        assert status == 200 and list(counted) == ["input_tokens"]
