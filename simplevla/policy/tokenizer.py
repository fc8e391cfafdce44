"""The prompt, and a small tokenizer made from the tasks' own words: no download, no surprises."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

UNKNOWN, START, END, PADDING = "<unk>", "<s>", "</s>", "<pad>"
_SPECIAL = (UNKNOWN, START, END, PADDING)

# Ways to say each of the tasks that RoboTwin defines for two Pipers, in our words.
INSTRUCTIONS = (
    "move the can next to the pot",
    "put the can beside the pot",
    "pick up the can and place it near the pot",
    "grasp the sauce can with the left arm and set it down by the kitchen pot",
    "grasp the sauce can with the right arm and set it down by the kitchen pot",
    "hit the red block with the hammer",
    "pick up the hammer and beat the block",
    "click the bell",
    "press the top of the bell with the closed gripper",
    "hand the block over from the left arm to the right arm and put it on the blue pad",
    "lift the pot with both arms",
    "pick up both bottles, one with each arm",
    "place the object to the left of the other object",
    "place the object to the right of the other object",
    "put the bowl on the plate",
    "put the cup on the plate",
    "place the empty cup on the coaster",
    "stack the two bowls on top of each other",
    "arrange the red, green and blue blocks in a row from left to right",
    "move the stapler onto the coloured pad",
    "put the bottles into the dustbin",
    "throw all three bottles away in the trash bin",
    "stack the blocks",
    "take a phone and put it on the stand",
    "hand over the microphone",
    "place the shoe in the box",
    "open the drawer and close the drawer",
    "push, pull, turn, slide, drop, pour or hold the small, large, white, black, yellow or round object",
)


def prompt(instruction: str) -> str:
    """Return OpenVLA's prompt for ``instruction``."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


def make_tokenizer(instructions: Iterable[str] = INSTRUCTIONS) -> bytes:
    """Return a word tokenizer (Hugging Face ``tokenizers`` JSON) that knows the words of ``instructions``.

    Case is ignored; a word it does not know becomes ``<unk>``. Ids 0 to 3 are ``<unk>``, ``<s>``,
    ``</s>`` and ``<pad>``.
    """
    words: dict[str, int] = {token: index for index, token in enumerate(_SPECIAL)}
    splitter, lower = Whitespace(), Lowercase()
    for instruction in instructions:
        for word, _ in splitter.pre_tokenize_str(lower.normalize_str(prompt(instruction))):
            words.setdefault(word, len(words))
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return str(tokenizer.to_str(pretty=True)).encode()
