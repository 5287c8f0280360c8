"""What tests/clients/schemathesis_test.py passes over: refusals by rules that no schema of a single field says."""
import re

import schemathesis
from schemathesis.openapi.checks import RejectedPositiveData

RULES = [
    r"the context holds \d+|prompt is too long",
    r"should (have|be) at most \d+ bytes|should be a string of 1 to \d+ bytes",  # schemas count characters
    r"names no token of the vocabulary",
    r"is not a field of this endpoint",  # ?strict
    r"is not there \(any more\)",
    r"add_generation_prompt and continue_final_message exclude each other",
    r"is the assistant's and the last|only an assistant's last message can be continued|cannot be continued with thinking off",
    r"tool_calls have no answers",
    r"top_logprobs needs logprobs",
    r"max_tokens should be at least 1, or 0 with echo",
    r"best_of should not be less than n",
    r"(best_of|prompt_logprobs) cannot be streamed",
    r"ask for more than \d+ answers",
    r"prompt(\[\d+\])? should not be empty",  # add_special_tokens: false
]


@schemathesis.hook
def filter_failure(context, failure, case, response):
    if not isinstance(failure, RejectedPositiveData) or response.status_code != 400:
        return True
    message = response.json()["error"]["message"]
    return not any(re.search(rule, message) for rule in RULES)
