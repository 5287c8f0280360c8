"""The official anthropic client of a Server. temperature is a field of ours to it: newer clients send none by themselves."""
import anthropic

GREEDY = {"temperature": 0}


def client_of(server, **options):
    return anthropic.Anthropic(**{"base_url": f"http://127.0.0.1:{server.port}", "api_key": "none", "max_retries": 0, "timeout": 300, **options})


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def blocks_of(message):
    """The content as a client hands it back: what it was given, without what only answers have."""
    return [block.model_dump(include={"type", "text", "thinking", "signature", "id", "name", "input"}) for block in message.content]


def prompt_tokens(usage):
    """input_tokens are those that were computed."""
    return usage.input_tokens + usage.cache_read_input_tokens
