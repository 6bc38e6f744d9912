"""Tables as programs save them: separators, encodings and headings with one meaning are read, others explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlab.core.errors import DataError
from fedlab.data.readers.folders import check_sites
from fedlab.data.readers.layouts import list_patients
from fedlab.data.readers.tables import find_column, read_table
from fedlab.data.sites.partition import by_column
from fedlab.data.sites.site_table import read_site_table
from folders import ball, save_files, write_paths

SITES = {"1": ["a", "b"], "2": ["c"]}
ROWS = [("Partition_ID", "Subject_ID", "age"), ("1", "a", "61"), ("1", "b", "47"), ("2", "c", "70")]


def text(separator: str, ending: str = "\n") -> str:
    return ending.join(separator.join(row) for row in ROWS) + ending


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_what_spreadsheets_write_is_read(separator: str, encoding: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text(separator, ending).encode(encoding))
    assert read_site_table(path).sites == SITES
    assert read_table(path)[1][2] == (4, {"Partition_ID": "2", "Subject_ID": "c", "age": "70"})
    assert set(by_column(path, "AGE", held_out=0).train) == {"61", "47", "70"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_first_line_that_tells_excel_the_separator_is_skipped(separator: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(f"\ufeffsep={separator}\r\n{text(separator, chr(13) + chr(10))}".encode())
    assert read_site_table(tmp_path / "t.csv").sites == SITES
    assert [line for line, _ in read_table(tmp_path / "t.csv")[1]] == [3, 4, 5]


@pytest.mark.parametrize(("one", "other"), [("UKE", "uke"), ("North  Bank", "north bank"), ("1", "01"), ("1", "1.0"),
                                            ("K\u00f6ln", "Ko\u0308ln")])
def test_one_site_written_in_two_ways_is_refused(one: str, other: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"Partition_ID,Subject_ID\n{one},a\n{other},b\n10,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"differ only in how they are written .* write each site in one way") as caught:
        read_site_table(tmp_path / "t.csv")
    show = ascii if "\u00f6" in one else repr  # the two forms of an umlaut look the same
    assert f"{show(one)} and {show(other)}" in str(caught.value)


def test_names_of_sites_that_differ_in_what_they_say_stay_apart(tmp_path: Path) -> None:
    names = ["1", "10", "100", "3.5", "3.05", "site 2", "site 20", "A", "AB"]
    (tmp_path / "t.csv").write_text("Partition_ID,Subject_ID\n" + "".join(f"{name},of {name}\n" for name in names))
    assert set(read_site_table(tmp_path / "t.csv").sites) == set(names)


@pytest.mark.parametrize(("listed", "stored"), [("7", "007"), ("7.0", "7"), ("p_a", "P_A"), ("J\u00f6", "Jo\u0308")])
def test_an_id_that_the_folder_writes_in_another_way_is_named(listed: str, stored: str, tmp_path: Path) -> None:
    for name in (stored, "P2"):
        save_files(ball(name, shape=(12, 14, 10)), tmp_path / "scans" / name)
    (tmp_path / "t.csv").write_text(f"Partition_ID,Subject_ID\n1,{listed}\n1,P2\n", encoding="utf-8")
    show = ascii if "\u00f6" in listed else repr
    with pytest.raises(DataError) as caught:
        check_sites(tmp_path / "scans", tmp_path / "t.csv")
    said = f"which has {show(stored)}; write {show(listed)} in t.csv as the folder does [no-folder]"
    assert said in str(caught.value)


@pytest.mark.parametrize("byte_order", ["utf-16-le", "utf-16-be"])
def test_utf_16_in_both_byte_orders(byte_order: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(("\ufeff" + text("\t")).encode(byte_order))
    assert read_site_table(tmp_path / "t.csv").sites == SITES


@pytest.mark.parametrize("head", ["PARTITION_ID,SUBJECT_ID", "partition id,subject id", "PartitionID,SubjectID",
                                  " Partition_ID ,Subject-ID"])
def test_headings_in_other_letters_are_found(head: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"{head}\n1,a\n1,b\n2,c\n")
    assert read_site_table(tmp_path / "t.csv").sites == SITES


def test_two_headings_alike_are_not_guessed_between(tmp_path: Path) -> None:
    assert find_column(["subject_id", "Subject_ID"], "Subject_ID") == "Subject_ID"
    assert find_column(["subject_id", "SUBJECT_ID"], "Subject_ID") is None
    (tmp_path / "t.csv").write_text("Partition_ID,subject_id,SUBJECT_ID\n1,a,b\n")
    with pytest.raises(DataError, match="no column Subject_ID; it has Partition_ID, subject_id, SUBJECT_ID; rename"):
        read_site_table(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [
    "Partition_ID;Subject_ID;name, first\n1;a;Roe, Jo\n1;b;\n2;c;Doe, Al\n",  # rows agree on the semicolons only
    "Partition_ID;Subject_ID;dose, mg\n1;a;0,5\n1;b;0,25\n2;c;1\n",
    'Partition_ID,Subject_ID,"a;b"\n1,a,x\n1,b,y\n2,c,z\n',
    "Partition_ID,Subject_ID,left;right\n1,a,x\n1,b,y;z\n2,c,z\n",
])
def test_a_second_mark_within_cells_does_not_mislead(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    assert read_site_table(tmp_path / "t.csv").sites == SITES


@pytest.mark.parametrize(("content", "said"), [
    (b"Partition_ID;a,Subject_ID\n1;x,a\n", "commas, semicolons or tabs could separate its cells; use one of them"),
    ("Partition_ID,Subject_ID\n1,Müller\n".encode("latin-1"), "cannot be read as a CSV table in UTF-8 or UTF-16"),
    ("Partition_ID,Subject_ID\n1,a\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    (b"\xff\xfeno table at all", "save it as CSV in UTF-8"),
    (b"\xff\xfe\x00", "save it as CSV in UTF-8"),
    (b"Partition_ID,Subject_ID\n1,a,b\n", "line 2 has more cells than the header has columns"),
    (b"PK\x03\x04\x14\0\6\0", "a workbook of a spreadsheet program, not a CSV table; save the sheet"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a workbook of a spreadsheet program, not a CSV table"),
])
def test_other_tables_are_refused_with_what_to_do(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_site_table(tmp_path / "t.csv")


@pytest.mark.parametrize(("name", "separator", "encoding"),
                         [("PATHS.CSV", ";", "utf-8"), ("paths.tsv", "\t", "utf-16")])
def test_tables_of_paths_are_read_likewise(name: str, separator: str, encoding: str, tmp_path: Path) -> None:
    write_paths(tmp_path, [ball("P1", shape=(12, 14, 10)), ball("P2", shape=(12, 14, 10))])
    written = (tmp_path / "paths.csv").read_text(encoding="utf-8")
    (tmp_path / "paths.csv").unlink()
    (tmp_path / name).write_bytes(written.upper().split("\n", 1)[0].replace(",", separator).encode(encoding)
                                  + written[written.index("\n"):].replace(",", separator).encode(encoding)
                                  .removeprefix(b"\xff\xfe"))
    for given in (tmp_path, tmp_path / name):
        listing = list_patients(given)
        assert list(listing.files) == ["P1", "P2"] and not listing.findings
        assert len(listing.files["P1"].images) == 4 and listing.files["P2"].label is not None
