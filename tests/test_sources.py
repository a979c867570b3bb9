"""Documents from files, tables and the standard library."""

from __future__ import annotations

import csv
import inspect
import json
import os
import zipfile
from pathlib import Path

import pytest

from c2v_rag.sources import Document, python_docs, read_sources

# The smallest files that Word and an EPUB reader would open.
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
DOCUMENT = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
DOCX = {
    "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"/>',
    "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships">'
    f'<Relationship Id="a" Type="{DOCUMENT}" Target="word/document.xml"/></Relationships>',
    "word/styles.xml": f'<w:styles xmlns:w="{WORD}"><w:style w:type="paragraph" w:styleId="Heading1">'
    '<w:name w:val="heading 1"/></w:style></w:styles>',
    "word/_rels/document.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="b" '
    f'Type="{DOCUMENT.removesuffix("officeDocument")}styles" '
    'Target="styles.xml"/></Relationships>',
    "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body><w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    "<w:r><w:t>Bread</w:t></w:r></w:p><w:p><w:r><w:t>Needs yeast.</w:t></w:r></w:p></w:body></w:document>",
}
EPUB = {
    "META-INF/container.xml": '<container><rootfiles><rootfile full-path="book.opf"/></rootfiles></container>',
    "book.opf": '<package><metadata/><manifest><item id="one" href="one.xhtml"/></manifest>'
    '<spine><itemref idref="one"/></spine></package>',
    "one.xhtml": "<html><body><h1>Bread</h1><p>Needs yeast.</p></body></html>",
}
SAMPLE_PDF = Path(__file__).parent / "data" / "two_pages.pdf"


def test_a_folder_gives_every_readable_file_in_order_and_no_hidden_one(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Bread\n\nNeeds yeast.", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.txt").write_text("\ufeffdeep", encoding="utf-8")
    (tmp_path / "c.py").write_text("print('hello')", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    documents = list(read_sources([tmp_path]))
    assert [(Path(d.source).name, d.text) for d in documents] == [
        ("deep.txt", "deep"),
        ("b.md", "# Bread\n\nNeeds yeast."),
        ("c.py", "print('hello')"),
    ]
    assert all(Path(document.source).is_absolute() for document in documents)
    assert len(list(read_sources([tmp_path], limit=2))) == 2


HTML = """<html><head><title>All about  bread</title><style>p {}</style></head><body>
<nav>Menu</nav><header>Logo</header>
<main><header><h1>Bread</h1></header><p>Needs <a href="yeast.html">yeast</a> and snake_case. Ä</p>
<h2>Flour</h2><pre>mix(flour)\n  bake()</pre><table><tr><th>kind</th></tr><tr><td>rye</td></tr></table>
<img src="data:image/png;base64,AAAA"></main><footer>Imprint</footer></body></html>"""


def test_html_keeps_headings_code_and_tables_and_leaves_out_navigation(tmp_path: Path) -> None:
    for name, encoding in (("page.html", "utf-8"), ("old.htm", "iso-8859-1")):
        meta = f'<head><meta charset="{encoding}">'
        (tmp_path / name).write_text(HTML.replace("<head>", meta), encoding=encoding)
        (html,) = read_sources([tmp_path / name])
        assert html.title == "All about bread"
        assert html.format == "markdown"
        assert html.text.startswith("# Bread\n\nNeeds yeast and snake_case. Ä\n\n## Flour")
        assert "mix(flour)\n  bake()" in html.text
        assert "| rye |" in html.text
        assert not any(part in html.text for part in ("Menu", "Logo", "Imprint", "yeast.html", "base64", "<p>"))
    (tmp_path / "plain.html").write_text("<p>Only a paragraph.</p>", encoding="utf-8")
    (html,) = read_sources([tmp_path / "plain.html"])
    assert (html.text, html.title) == ("Only a paragraph.", "")


def test_pdf_gives_a_document_for_each_page() -> None:
    first, second = read_sources([SAMPLE_PDF])
    assert "first page speaks of bread" in first.text
    assert "second page speaks of heaps" in second.text
    assert (first.metadata["page"], second.metadata["page"]) == (1, 2)
    assert first.source == second.source


def test_office_files_become_markdown_with_headings(tmp_path: Path) -> None:
    pytest.importorskip("markitdown")
    import openpyxl
    import pptx

    slides = pptx.Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "Bread", "Needs yeast."
    slides.save(tmp_path / "a.pptx")
    book = openpyxl.Workbook()
    book.active.title = "Prices"
    book.active.append(["item", "price"])
    book.active.append(["rye", 3])
    book.save(tmp_path / "b.xlsx")
    with zipfile.ZipFile(tmp_path / "c.docx", "w") as file:
        for name, content in DOCX.items():
            file.writestr(name, content)
    with zipfile.ZipFile(tmp_path / "d.epub", "w") as file:
        for name, content in EPUB.items():
            file.writestr(name, content)
    found = {Path(document.source).suffix: document for document in read_sources([tmp_path])}
    assert {document.format for document in found.values()} == {"markdown"}
    assert "# Bread" in found[".pptx"].text
    assert "Needs yeast." in found[".pptx"].text
    assert "## Prices" in found[".xlsx"].text
    assert "| rye | 3 |" in found[".xlsx"].text
    assert "# Bread\n\nNeeds yeast." in found[".docx"].text
    assert "# Bread\n\nNeeds yeast." in found[".epub"].text
    (tmp_path / "broken.docx").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"broken\.docx cannot be read"):
        list(read_sources([tmp_path / "broken.docx"]))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_gives_a_document_a_row_with_its_columns_as_metadata(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    rows = [{"text": "first, with a comma", "year": 1999}, {"text": "second\nline", "year": 2001}]
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif suffix == ".csv":
        path.write_text('text,year\n"first, with a comma",1999\n"second\nline",2001\n', encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    year = {".csv": str}.get(suffix, int)
    assert list(read_sources([path])) == [
        Document("first, with a comma", path.resolve().as_posix(), {"year": year(1999), "row": 0}),
        Document("second\nline", path.resolve().as_posix(), {"year": year(2001), "row": 1}),
    ]
    with pytest.raises(ValueError, match=r"row 0 has no string 'body'; its columns are \['text', 'year'\]"):
        list(read_sources([path], text_column="body"))


def test_an_unreadable_file_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        read_sources([tmp_path / "missing"])
    with pytest.raises(ValueError, match=r"broken.jsonl:2: not valid JSON"):
        list(read_sources([tmp_path / "broken.jsonl"]))
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=r"cannot read .jpg; known: .csv .docx .epub .htm"):
        read_sources([tmp_path / "photo.jpg"])

    problems: dict[str, str] = {}
    documents = list(read_sources([tmp_path], on_error=lambda path, error: problems.update({path.name: str(error)})))
    assert [d.text for d in documents] == ["good"], "a table that breaks off gives nothing, not its first rows"
    assert problems.keys() == {"latin.txt", "broken.pdf", "broken.jsonl"}
    assert "not UTF-8" in problems["latin.txt"]
    assert "cannot be read as a PDF" in problems["broken.pdf"]


def test_a_library_error_inside_a_reader_is_that_files_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pypdf.errors import DependencyError

    def locked(path: Path) -> None:
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr("pypdf.PdfReader", locked)
    (tmp_path / "a_locked.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    (tmp_path / "z.txt").write_text("good", encoding="utf-8")
    problems: dict[str, Exception] = {}
    documents = list(read_sources([tmp_path], on_error=lambda path, error: problems.update({path.name: error})))
    assert [d.text for d in documents] == ["good"]
    assert problems.keys() == {"a_locked.pdf", "broken.parquet", "latin.csv"}
    for name, error in problems.items():
        assert isinstance(error, ValueError), name
        assert str(tmp_path / name) in str(error)
    assert "cryptography" in str(problems["a_locked.pdf"])
    with pytest.raises(ValueError, match=r"a_locked.pdf cannot be read: DependencyError: cryptography"):
        list(read_sources([tmp_path / "a_locked.pdf"]))


def test_long_csv_fields_are_read_and_an_unclosed_quote_is_that_files_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = csv.field_size_limit(131_072)
    try:
        (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n", encoding="utf-8")
        assert [len(document.text) for document in read_sources([tmp_path / "long.csv"])] == [200_000]
        csv.field_size_limit(131_072)
        monkeypatch.setattr("c2v_rag.sources.formats.CSV_FIELD_CHARACTERS", 140_000)
        problems: list[str] = []
        assert not list(read_sources([tmp_path], on_error=lambda path, error: problems.append(str(error))))
        assert f"{tmp_path / 'long.csv'}: not valid CSV after line 1 (field larger than field limit" in problems[0]
    finally:
        csv.field_size_limit(before)


def test_a_table_that_changes_during_reading_gives_the_rows_of_one_version(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text\n" + "".join(f"row {i}\n" for i in range(5000)), encoding="utf-8")
    documents = read_sources([tmp_path], on_error=lambda path, error: pytest.fail(str(error)))
    first = next(documents)
    path.write_bytes(b"text\nrow 0\n\xff\n")
    assert [document.text for document in (first, *documents)] == [f"row {i}" for i in range(5000)]


def test_an_empty_file_gives_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    assert [document.text for document in read_sources([tmp_path])] == ["", ""]


def test_python_docs_have_the_public_names() -> None:
    documents = {document.source: document for document in python_docs()}
    assert len(documents) > 5000
    known = ["urllib.parse.urlparse", "asyncio.gather", "os.cpu_count", "os.path.join", "str.split", "sorted"]
    known += ["json.dumps", "collections.Counter.most_common", "pathlib.Path.exists", "getpass.getpass", "re.compile"]
    assert [name for name in known if name not in documents] == []
    assert [name for name in documents if name.startswith(("builtins.", "posix.", "test.", "_"))] == []
    assert documents["os.cpu_count"].text == f"os.cpu_count()\n\n{inspect.getdoc(os.cpu_count)}"


def test_python_docs_are_equal_everywhere_and_contain_nothing_of_the_machine() -> None:
    for document in python_docs():
        assert os.environ["PATH"] not in document.text, document.source
        assert " object at 0x" not in document.text.partition("\n")[0], document.source


def test_every_question_has_answers_in_python_docs_without_naming_them() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "python_docs_questions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = {document.source for document in python_docs()}
    assert len({row["question"] for row in rows}) == 60
    for row in rows:
        assert row["answers"]
        assert set(row["answers"]) <= names
        words = set(row["question"].lower().replace("?", "").replace(",", "").split())
        for answer in row["answers"]:
            assert not words & set(answer.lower().replace("_", ".").split(".")), row
