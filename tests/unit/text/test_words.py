"""Words in every script, and one form for a text's several spellings."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.models.tiny import minilm_tokenizer
from invar_ray.schema import Document
from invar_ray.text.answers import contains_answer, find_answer, searchable
from invar_ray.text.chunking import chunk_document
from invar_ray.text.language import english_share, is_latin
from invar_ray.text.sentences import sentence_starts
from invar_ray.text.windows import resize_windows
from invar_ray.text.words import fold, terms, words


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("守塔人名叫李明，他住在青岛。", "青岛", "青岛"),
        ("它建于１８９２年，高３０米。", "1892", "１８９２"),
        ("共１，２００人，２０２１，２０２２年", "1200", "１，２００"),
        ("玛丽·居里，生于1867年", "1867年", "1867年"),
        ("ราชธานีเก่าคือสุโขทัยและอยุธยา", "สุโขทัย", "สุโขทัย"),
        ("등대는 부산에 있다", "부산", "부산"),
        (unicodedata.normalize("NFD", "등대는 부산에 있다"), "부산", None),
        ("ປະເທດລາວມີແມ່ນ້ຳຂອງ", "ແມ່ນ້ຳຂອງ", "ແມ່ນ້ຳຂອງ"),
        ("灯台はﾄﾞｲﾂにある", "ドイツ", "ﾄﾞｲﾂ"),
        ("नदी का नाम गंगा है।", "गंगा", "गंगा"),
        ("The har\u00adbour at Lerwick", "harbour", "har\u00adbour"),
        ("The har\u200bbour\ufeff at Lerwick", "harbour", "har\u200bbour"),
        ("A cafe\u0301 in Brest", "café", "cafe\u0301"),
        ("A café in Brest", "cafe\u0301", "café"),
        ("the of\ufb01ce of the \ufb02eet", "office of the fleet", "of\ufb01ce of the \ufb02eet"),
        ("in Ｂｅｒｌｉｎ 1990", "Berlin", "Ｂｅｒｌｉｎ"),
        ("ꦗꦮꦏꦛꦗꦮ", "ꦏꦛ", "ꦏꦛ"),  # Javanese, New Tai Lue, Yi: none writes spaces
        ("ᦎᦷᦑᦺᦖᧈᦉᦲᦗᦸᧂᦉᦱ", "ᦑᦺᦖᧈ", "ᦑᦺᦖᧈ"),
        ("ꆈꌠꁱꂷꏂꌠ", "ꁱꂷ", "ꁱꂷ"),
        ("İstanbul ve Bursa", "istanbul", "İstanbul"),
        ("im Jahr ١٩٩٠", "1990", "١٩٩٠"),
        ("Acme™ sells it", "Acme", "Acme"),
        ("a party", "art", ""),
        ("灯塔", "塔灯", ""),
    ],
)
def test_an_answer_is_found_in_any_script_and_spelling(
    text: str, answer: str, found: str | None
) -> None:
    span = find_answer(text, [answer])
    assert contains_answer(text, [answer]) is (span is not None)
    if found is None:  # decomposed: what counts is that it reads the same
        assert span is not None
        found = text[slice(*span)]
        assert unicodedata.normalize("NFC", found) == answer
    assert (text[slice(*span)] if span else "") == found


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_every_normal_form_compares_the_same(text: str, form: str) -> None:
    other = unicodedata.normalize(form, text)
    assert fold(fold(text)) == fold(text)
    assert searchable(other) == searchable(unicodedata.normalize("NFC", other))
    span = find_answer(f"x {other} y", [other])
    assert (span is None) is (not contains_answer(other, [other]))


def test_words_keep_their_marks_and_terms_have_pairs() -> None:
    assert words("हिन्दी की किताब") == ["हिन्दी", "की", "किताब"]
    assert words("iPhone手机") == ["iphone", "手", "机"]
    assert terms("古い灯台") == ["古", "い", "灯", "台", "古い", "い灯", "灯台"]
    assert terms("Snake_case isn't") == ["snake", "case", "isn", "t"]


def test_sentences_of_other_scripts_end() -> None:
    for text in ("पहला वाक्य। दूसरा वाक्य।", "هل هذا؟ نعم هذا.", "第一句。第二句！"):
        assert len(sentence_starts(text)) == 2


def test_text_without_spaces_is_cut_evenly_and_has_windows() -> None:
    text = "章\n" + "守塔人每天晚上点亮灯塔然后记录风向和海浪的高度" * 30
    document = Document("d", "", text, "")
    cut = chunk_document(document, minilm_tokenizer(), tokens=64, stride=48)
    sizes = [passage.end - passage.start for passage in cut[1:-1]]
    assert min(sizes) > 30
    windows = resize_windows(document, cut[2].start, cut[2].end, ["记录风向"], 3, 7)
    assert len(windows) == 3
    assert all("记录风向" in text[window.start : window.end] for window in windows)


def test_english_is_told_from_other_languages() -> None:
    english = ["Who kept the light?", "What is the height of the tower?"]
    german = ["Wer baute den Turm?", "Wie hoch ist der Turm?"]
    assert english_share(english) == 1.0
    assert english_share(german) == 0.0
    assert english_share(["灯塔有多高？"]) == 0.0
    assert is_latin("Łódź 1892?")
    assert not is_latin("Где находится маяк?")
