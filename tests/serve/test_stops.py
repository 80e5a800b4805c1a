from hypothesis import given
from hypothesis import strategies as st

from tanuki_jax.serve.stops import StopFinder


def passed(stops, pieces):
    finder, text = StopFinder(stops), ""
    for piece in pieces:
        new, is_stopped = finder.add(piece)
        text += new
        if is_stopped:
            return text, True
    return text + finder.finish(), False


def test_a_stop_string_over_several_pieces_is_cut_off_and_what_only_begins_one_is_not():
    assert passed(["\n\n"], ["a\n", "b\n", "\nc"]) == ("a\nb", True)
    assert passed(["###"], ["a##", "b#"]) == ("a##b#", False)
    assert passed(["", "b"], ["abc"]) == ("a", True)
    assert passed([], ["a", "b"]) == ("ab", False)


def test_nothing_waits_that_cannot_begin_a_stop_string():
    finder = StopFinder(["END"])
    assert finder.add("an E") == ("an ", False) and finder.add("gg") == ("Egg", False)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_pieces_change_nothing(text, stops, data):
    whole = passed(stops, list(text))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert passed(stops, pieces) == whole
    assert not any(stop in whole[0] for stop in stops)
    assert whole[1] == any(stop in text for stop in stops)
