"""Captions in their three wordings have the same content, use separate words, and are good English."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.data.synthetic.captions import UNSEEN_VERBS, VARIED_VERBS, VERBS, WORDINGS, base_form, gerund, noun
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.synthetic.scene import BACKGROUNDS, COLOURS, DIRECTIONS, GRADIENTS, SHAPES, SIZES, Scene
from lumos.data.synthetic.sprites import SPRITES
from lumos.evaluation.captions import named_attributes, parse_caption

GROUNDS = (*BACKGROUNDS, *GRADIENTS)
MOTION_WORDS = {
    **{way: rf"{way}(?:wards)?" for way in DIRECTIONS},
    "still": r"(?:(?:stay|stand|remain|hold)s?|is|are) still|stays? in place|rests?|(?:does|do|is|are) not (?:move|moving)",
    "grows": r"grows|expands|swells|(?:is|keeps) (?:grow|expand|swell)ing|(?:gets|becomes|getting|becoming) (?:bigger|larger)",
    "shrinks": r"shrinks|contracts|diminishes|(?:is|keeps) (?:shrink|contract|diminish)ing|(?:gets|becom\w+|getting) smaller",
}
STANDING = ("stays", "does", "stands", "remains", "holds", "rests", "is")
BASE_FORMS = {base_form(verb) for verb in (*VERBS, *VARIED_VERBS, *UNSEEN_VERBS, *STANDING)}
_NOUN = rf"the digit \d|an? (?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join((*SHAPES, *SPRITES))})\b"


def scenes(wording: str, count: int, num_frames: int = 17, **options) -> list[Scene]:
    options = {"kinds": ("shapes", "sprites"), "share_sprites": 0.5, "share_two": 0.3} | options
    worlds = SyntheticScenes(21, split="all", wording=wording, num_frames=num_frames, **options)
    return [worlds.scene(index) for index in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([1, 17]))
def test_plain_captions_are_parsed_back(index, num_frames):
    kinds = ("shapes", "digits", "sprites")
    scene = SyntheticScenes(7, split="all", kinds=kinds, share_sprites=0.5, share_two=0.5, num_frames=num_frames).scene(index)
    assert parse_caption(scene.caption) == named_attributes(scene)


@pytest.mark.parametrize("name", SPRITES)
def test_every_sprite_is_understood(name):
    article = "an" if name[0] in "aeiou" else "a"
    assert parse_caption(f"{article} {name} slides up on a sky background") == {
        "objects": [{"sprite": name, "motion": "up"}],
        "background": "sky",
    }


@pytest.mark.parametrize(
    ("caption", "things"),
    [
        ("an apple and a banana move right", [("apple", "right"), ("banana", "right")]),
        ("an apple and a banana stay still.", [("apple", "still"), ("banana", "still")]),
        ("an owl and a car and a fish go up", [("owl", "up"), ("car", "up"), ("fish", "up")]),
        ("an apple moves left and a banana moves right", [("apple", "left"), ("banana", "right")]),
        ("an apple and a banana moves right", [("apple", None), ("banana", "right")]),
        ("an owl and a car", [("owl", None), ("car", None)]),
    ],
)
def test_a_plural_verb_applies_to_all_objects(caption, things):
    wanted = [{"sprite": name} | ({"motion": motion} if motion else {}) for name, motion in things]
    assert parse_caption(caption) == {"objects": wanted}


@pytest.mark.parametrize("num_frames", [1, 17])
def test_every_wording_names_the_same_attributes(num_frames, times):
    kinds = ("shapes", "digits", "sprites")
    plain, varied, unseen = (scenes(wording, times(150, 500), num_frames, kinds=kinds) for wording in WORDINGS)
    for first, *others in zip(plain, varied, unseen, strict=True):
        for other in others:
            assert other.objects == first.objects
            assert named_attributes(other) == named_attributes(first)


@pytest.mark.parametrize("wording", WORDINGS)
def test_captions_say_what_is_shown(wording, times):
    pattern = re.compile("|".join(rf"(?P<{motion}>\b(?:{words})\b)" for motion, words in MOTION_WORDS.items()))
    for scene in scenes(wording, times(400, 1500)):
        said = [match.lastgroup for match in pattern.finditer(scene.caption)]
        motions = [thing.motion for thing in scene.objects]
        together = scene.objects[0].sprite and len(set(motions)) == 1
        assert said == (motions[:1] if together else motions), scene.caption
        places = [max(scene.caption.find(noun(thing, named)) for named in (True, False)) for thing in scene.objects]
        assert -1 not in places
        assert places == sorted(places)
        grounds = [ground for ground in GROUNDS if re.search(rf"\b{ground}\b", scene.caption)]
        assert grounds in ([], [scene.background])


@pytest.mark.parametrize("num_frames", [1, 17])
def test_captions_name_attributes_at_the_set_shares(num_frames):
    for wording in WORDINGS:
        found = scenes(wording, 600, num_frames, kinds="shapes", share_two=0, share_size=0.6, share_background=0.3)
        named = [named_attributes(scene) for scene in found]
        assert sum("size" in ask["objects"][0] for ask in named) / 600 == pytest.approx(0.6, abs=0.06)
        assert sum("background" in ask for ask in named) / 600 == pytest.approx(0.3, abs=0.06)


def forms(found: list[Scene]) -> set[str]:
    """Return the forms of captions, with letters for objects, directions and grounds: "N moves D on a G background"."""
    texts = (re.sub(_NOUN, "N", scene.caption) for scene in found)
    texts = (re.sub(rf"\b(?:{'|'.join(GROUNDS)})\b", "G", text) for text in texts)
    return {re.sub(rf"\b(?:{'|'.join(DIRECTIONS)})(?=\b|wards)", "D", text) for text in texts}


def phrases(found: list[Scene]) -> dict[str, set[str]]:
    """Return the parts of the forms: openings, statements about an object, grounds."""
    parts = defaultdict(set)
    for form in forms(found):
        ground = re.search(r"^(?:on|over) .*?G background, |( (?:on|over|against|in front of) (?:a G background|G))$", form)
        if ground:
            parts["ground"].add(ground.group())
            form = form.replace(ground.group(), "")
        opening, *verbs = (part.strip().removesuffix("and").strip() for part in form.split("N"))
        parts["opening"].add(opening)
        parts["verb"].update(verbs)
    return {name: found - {""} for name, found in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", [1, 17])
def test_unseen_words_are_never_heard_in_training(num_frames, times):
    count = times(1600, 2500)
    seen = scenes("varied", count, num_frames) + scenes("plain", count // 5, num_frames)
    unseen = scenes("unseen", count, num_frames)
    assert len(forms(seen)) > 10
    assert not forms(seen) & forms(unseen)
    of_seen, of_unseen = phrases(seen), phrases(unseen)
    assert of_unseen["ground"] == {"over a G background, ", " against a G background"}
    assert len(of_unseen["opening"]) == {1: 2, 17: 1}[num_frames]
    if num_frames > 1:
        assert {"heads D", "is moving Dwards", "is not moving", "are moving to the D"} <= of_unseen["verb"]
        assert {"moves D", "drifts Dwards", "goes to the D", "stand still", "becomes larger"} <= of_seen["verb"]
    for name, found in of_unseen.items():
        assert not found & of_seen[name]


def test_forms_of_verbs():
    assert [base_form(verb) for verb in ("moves", "goes", "flies", "marches", "passes", "dashes", "cruises", "does", "is")] == [
        "move", "go", "fly", "march", "pass", "dash", "cruise", "do", "are",
    ]  # fmt: skip
    assert [gerund(verb) for verb in ("glides", "flies", "passes", "dances")] == ["gliding", "flying", "passing", "dancing"]
    assert not {*VERBS, *VARIED_VERBS} & {*UNSEEN_VERBS}


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("num_frames", [1, 17])
def test_captions_are_good_english(wording, num_frames, times):
    both, count = 0, times(300, 1200)
    for scene in scenes(wording, count, num_frames, share_two=0.6):
        text = scene.caption
        assert text == " ".join(text.split())
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
        assert not re.search(r"\b(picture|image)\b" if num_frames > 1 else r"\b(video|clip|mov\w+|still)\b", text)
        if num_frames > 1 and scene.objects[0].sprite and len({thing.motion for thing in scene.objects}) < len(scene.objects):
            a, b = (noun(thing, named_size=False) for thing in scene.objects)
            verb = re.search(rf"{a} and {b} (\w+)", text).group(1)
            assert verb in BASE_FORMS
            both += 1
        elif num_frames > 1:
            assert not re.search(rf"\b({'|'.join(BASE_FORMS)})\b", text.replace("does not move", ""))
    assert num_frames == 1 or both > count // 24
