"""Tools: what the model is told, what its calls give, and where the answer stands in the conversation."""

import json

import pytest

from jgrpo.config import RolloutConfig
from jgrpo.errors import UserError
from jgrpo.rollout import Environment, describe_tools, environment_factory
from jgrpo.rollout.environment import chat_reply
from jgrpo.rollout.tools import tool_schema
from tests.rollout.environments import Echo, add, untyped
from tests.tiny_checkpoints import make_tokenizer

EOS = (258, 256)
HERE = "tests.rollout.environments"
CALL = '<tool_call>{{"name": "add", "arguments": {}}}</tool_call>'


@pytest.fixture
def environment():
    made = environment_factory(RolloutConfig(tools=(f"{HERE}.add", f"{HERE}.broken")), make_tokenizer(), EOS)()
    made.reset({})
    return made


def test_schema_is_json_of_the_signature():
    schema = tool_schema(add)
    assert schema["name"] == "add"
    assert schema["description"] == "The sum of two numbers."
    properties = schema["parameters"]["properties"]
    assert {name: value["type"] for name, value in properties.items()} == {"a": "number", "b": "number"}
    assert schema["parameters"]["required"] == ["a"]
    assert json.dumps(schema) in describe_tools([add])


@pytest.mark.parametrize(("function", "message"), [(untyped, "parameter 'a' has no type"), (lambda: 0, "no docstring")])
def test_tools_without_a_description(function, message):
    with pytest.raises(UserError, match=message):
        describe_tools([function])


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('{"name": "add", "arguments": {"a": 2, "b": 0.5}}', "2.5"),
        ('{"name": "add", "arguments": {"a": "2"}}', "3.0"),
        ('{"name": "add", "arguments": {"a": "two"}}', "error: a: Input should be a valid number"),
        ('{"name": "add"}', "error: a: Missing required argument"),
        ('{"name": "sub", "arguments": {}}', "error: no function 'sub'; there are: add, broken"),
        ('{"name": "broken", "arguments": {}}', "error: RuntimeError: out of order"),
        ("add(1, 2)", "error: not JSON"),
        ("[1]", "error: expected"),
    ],
)
def test_calls(environment, text, result):
    assert environment.call(text).startswith(result)


def test_turn_with_calls_is_answered_and_one_without_is_the_last(environment):
    turn = "Both: " + CALL.format('{"a": 1}') + " and " + CALL.format('{"a": 5}')
    assert environment.step(turn) == (
        "\n<|im_start|>tool\n2.0<|im_end|>\n<|im_start|>tool\n6.0<|im_end|>\n<|im_start|>assistant\n"
    )
    assert environment.step("The answer is 2.") is None


def test_conversation_is_the_chat_templates(environment):
    """Sampled turn + reply = what the template writes for the whole conversation, whichever token ends a turn."""
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "call"}]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "tool", "content": "2"}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt + "call<|im_end|>" + chat_reply(tokenizer, EOS, ["2"]) == whole
    assert chat_reply(make_tokenizer(chat_template=None), EOS, ["2"]) == "\n2\n"


def test_template_without_the_role():
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="refuses messages of role 'tool'"):
        chat_reply(make_tokenizer(chat_template=template), EOS, ["2"])


def test_environment_by_path():
    factory = environment_factory(RolloutConfig(environment=f"{HERE}.Echo"), make_tokenizer(), EOS)
    assert isinstance(factory(), Echo)
    assert isinstance(factory(), Environment)
    assert environment_factory(RolloutConfig(), make_tokenizer(), EOS) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": ("add",)}, "'add' is not a dotted path"),
        ({"tools": ("nowhere.add",)}, "cannot import 'nowhere'"),
        ({"environment": f"{HERE}.Missing"}, "no function or class 'Missing'"),
        ({"environment": f"{HERE}.number"}, "returns int; expected an object with stop_strings"),
    ],
)
def test_paths_that_lead_nowhere(settings, message):
    with pytest.raises(UserError, match=message):
        environment_factory(RolloutConfig(**settings), make_tokenizer(), EOS)
