"""Prompt templates: the published texts letter by letter, and data that tries to break them."""

import pytest
from make_files import picture

from vtfast.data import Sample
from vtfast.data.prompt_templates import IMAGE, join_options, load_template, render, response_prefix, template_names
from vtfast.utils.errors import UserError

OURS = [name for name in template_names() if not name.startswith("eval")]


def sample(question="Is A left of B?", options=("yes", "no"), images=1) -> Sample:
    return Sample(
        question=question,
        options=list(options),
        answer=options[0] if options else "left",
        images=[picture(seed=n) for n in range(images)],
    )


def test_the_papers_base_prompt():
    assert render(load_template("r1-zero"), sample(), literal_image=True) == (
        "<|vision_start|><|image_pad|><|vision_end|><image>A conversation between User and "
        "Assistant. The user asks a question about the image, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the "
        "user with the answer.\n"
        "User:  Answer in natural language. Is A left of B? Choose between the following options: "
        "yes or no \n"
        "Assistant: Let me solve this step by step.\n"
        "<think>"
    )


def test_the_papers_instruct_prompt():
    assert render(load_template("instruct"), sample(), literal_image=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><image> Answer in natural language. "
        "Is A left of B? Choose between the following options: yes or no  Output the thinking "
        "process in <think> </think> and final answer (option) in <answer> </answer> tags."
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_papers_prompt_without_reasoning():
    assert render(load_template("r1-zero-direct"), sample(), literal_image=True) == (
        "<|vision_start|><|image_pad|><|vision_end|><image>A conversation between User and "
        "Assistant. The user asks a question about the image, and the Assistant solves it.\n"
        "User:  Answer in natural language. Is A left of B? Choose between the following options: "
        "yes or no \n"
        "Assistant: "
    )


def test_the_authors_reflection_prompt():
    assert render(load_template("instruct-reflection"), sample(), literal_image=True) == (
        "<|im_start|>system\nYou are a helpful assistant capable of complex reasoning and "
        "reflection.<|im_end|>\n"
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><image> Answer in natural language. "
        "Is A left of B? Choose between the following options: yes or no  Output the thinking "
        "process in <think> </think> and final answer (option) in <answer> </answer> tags. If you "
        "detect that you made a mistake in your reasoning at any point, correct yourself inside "
        "<reflection></reflection> tags.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_r1_vs_prompt():
    assert render(load_template("r1-v"), sample("How many items?", ())) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>How many items?  Output the thinking process in "
        "<think> </think> and final answer (number) in <answer> </answer> tags.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_open_r1s_prompt():
    assert render(load_template("open-r1"), sample("Find x.", ())) == (
        "<|im_start|>system\nA conversation between User and Assistant. The user asks a question, "
        "and the Assistant solves it. The assistant first thinks about the reasoning process in "
        "the mind and then provides the user with the answer. The reasoning process and answer are "
        "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
        "reasoning process here </think><answer> answer here </answer><|im_end|>\n"
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Find x.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_open_question_about_nothing_to_see():
    text = render(load_template("r1-zero-text"), sample("1 + 1?", (), images=0))
    assert text.endswith("\nUser: 1 + 1?\nAssistant: <think>")
    assert "image" not in text and "<answer> </answer>" in text


@pytest.mark.parametrize("name", OURS)
def test_an_open_question_is_not_offered_options(name):
    text = render(load_template(name), sample(options=()))
    assert "hoose" not in text and "[[" not in text and "]]" not in text
    assert "Is A left of B?" in text
    with_options = render(load_template(name), sample(options=("a", "b", "c")))
    assert "a, b or c" in with_options and "[[" not in with_options


def test_parts_that_are_left_out():
    both, neither = sample(), sample(options=(), images=0)
    for template, full, empty in (
        ("{question}[[ ({options})]].", "Is A left of B? (yes or no).", "Is A left of B?."),
        ("[[Look: {images}]]{question}", f"Look: {IMAGE}Is A left of B?", "Is A left of B?"),
        ("{question}[[ {images}, {options}]]", f"Is A left of B? {IMAGE}, yes or no", "Is A left of B?"),
        ("{question}[[\n{options}\n]]", "Is A left of B?\nyes or no\n", "Is A left of B?"),
        ("{question} [[1, 2]] ]] [[", "Is A left of B? [[1, 2]] ]] [[", "Is A left of B? [[1, 2]] ]] [["),
        ("[[[{options}]]]{question}", "[yes or no]Is A left of B?", "]Is A left of B?"),
    ):
        full = full if "{images}" in template else IMAGE + full
        assert render(template, both) == full
        assert render(template, neither) == empty


def test_a_part_with_two_slots_needs_both():
    template = "{question}[[ {images}, {options}]]"
    assert render(template, sample(images=0)) == "Is A left of B?"
    assert render(template, sample(options=())) == "Is A left of B?"


def test_brackets_in_the_data_are_text():
    asked = sample(question="[[ {options} ]]", options=("[[", "]]"), images=0)
    assert render("{question}[[ {options}]]", asked) == "[[ {options} ]] [[ or ]]"
    assert render("{question}[[ {options}]]", sample("[[a]]", (), 0)) == "[[a]]"


def test_the_literal_image_is_a_switch():
    for name in template_names():
        plain, literal = (render(load_template(name), sample(), literal_image=on) for on in (False, True))
        assert "<image>" not in plain and literal.replace("<image>", "") == plain
        assert "<image>" not in render(load_template(name), sample(images=0), literal_image=True)


def test_the_brief_prompt():
    text = render(load_template("brief"), sample(options=("a", "b", "c")))
    assert text == IMAGE + "User: Is A left of B? Choose: a, b or c\nAssistant: <think>"


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("images", [0, 1, 3])
def test_one_placeholder_per_image(name, images):
    text = render(load_template(name), sample(images=images))
    assert text.count(IMAGE) == text.count("<|image_pad|>") == images


def test_response_prefix():
    begun = [name for name in OURS if response_prefix(load_template(name)) == "<think>"]
    assert begun == ["brief", "r1-zero", "r1-zero-text"]
    assert response_prefix(load_template("instruct")) == ""


def test_options_read_as_visualthinker_wrote_them():
    assert join_options(["a"]) == "a"
    assert join_options(["a", "b"]) == "a or b"
    assert join_options(["3", "2", "6", "4", "5"]) == "3, 2, 6, 4 or 5"


def test_braces_in_the_data_are_text():
    asked = sample(question="{options} {images} {question} {0} {", options=("{question}", "{}"))
    assert render("{question}|{options}", asked) == (IMAGE + "{options} {images} {question} {0} {|{question} or {}")


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes(b"Q: {question}\r\nA: <think>\n")
    assert render(load_template(file), sample()) == IMAGE + "Q: Is A left of B?\nA: <think>"


def test_wrong_templates(tmp_path):
    with pytest.raises(UserError, match="did you mean 'r1-zero'"):
        load_template("r1zero")
    with pytest.raises(UserError, match="nowhere"):
        load_template(tmp_path / "nowhere.txt")
    (tmp_path / "no-slot.txt").write_text("User: {options}")
    with pytest.raises(UserError, match=r"no-slot.txt lacks \{question\}"):
        load_template(tmp_path / "no-slot.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe{question}")
    with pytest.raises(UserError, match="binary"):
        load_template(tmp_path / "binary.txt")
