import re

from tanuki_jax.synth.families import FAMILIES
from tests.synth.families.draws import draws


def spelt(text):
    return [m.split("・") for m in re.findall(r"「(.+?)」", text)]


def test_letters_are_counted_one_by_one_up_to_their_number():
    for _, prompt, right, _, said in draws(FAMILIES["counting"]):
        [letters] = spelt(prompt)
        counted = "".join(f"{c}{i}" for i, c in enumerate(letters, 1))
        body, total = re.fullmatch(r"(.+)(?:。(?=\d+文)|\. It has )(\d+)(?:文字です。| letters\.)", right).groups()
        assert re.sub("、|, ", "", body) == counted and int(total) == len(letters)
        assert spelt(said) == [letters] and said.endswith(right)


def test_strings_are_read_backwards():
    for _, prompt, right, wrong, said in draws(FAMILIES["reversing"]):
        [letters] = spelt(prompt)
        assert spelt(right) == [letters[::-1]] != spelt(wrong)
        assert spelt(said) == [letters, letters[::-1]]
