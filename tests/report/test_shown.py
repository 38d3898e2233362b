"""What a run wants shown beside tables and curves: read with care, shown as text and picture, never as markup."""

import json

from kibitz.report import build
from kibitz.report.shown import read_shown


def put(folder, tree) -> None:
    (folder / "shown.json").write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")


def test_unreadable_files_and_pictures_from_elsewhere_are_left_out_and_told(tmp_path):
    for tree, told in (("{", "shown.json cannot be read"), ({"title": "x"}, "shown.json cannot be read")):
        notices: list[str] = []
        put(tmp_path, tree)
        assert read_shown(tmp_path, notices) == [] and told in notices[0]
    (tmp_path.parent / "secret.svg").write_text("<svg/>")
    (tmp_path / "page.html").write_text("<p>")
    notices = []
    put(tmp_path, [{"title": "t", "image": name} for name in ("../secret.svg", "page.html", "no.png")])
    assert [row["image"] for row in read_shown(tmp_path, notices)] == ["", "", ""] and len(notices) == 3


def test_titles_texts_and_lines_are_no_markup(tmp_path):
    bad = "<script>alert(1)</script>"
    put(tmp_path, [{"title": bad, "words": bad, "text": bad, "lines": [bad]}, "not a section"])
    (tmp_path / "metrics.jsonl").write_text("")
    text = build([tmp_path]).read_text(encoding="utf-8")
    assert bad not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert "heat-map of tokens" not in text and "rollouts.jsonl is missing" not in text
