"""A data card as Croissant metadata (MLCommons, Croissant format specification 1.0 and its RAI extension 1.0)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from fedlab.data.cards.schema import LICENCES, is_open

__all__ = ["CONFORMS_TO", "croissant"]

#: The two specifications of the metadata.
CONFORMS_TO = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
_FORMATS = {".nii.gz": "application/gzip", ".nii": "application/octet-stream", ".csv": "text/csv",
            ".json": "application/json"}
#: Tables of a card that become records, with their descriptions.
_RECORDS = {"splits": "The parts of the data set with their numbers of patients, and the source of each number.",
            "labels": "The meaning of the values in a label map.",
            "statistics": "Statistics released by the site; withheld if too few patients contribute to a number."}


def croissant(metadata: Mapping[str, Any], summary: str, *, open_fields: Sequence[str] = ()) -> dict[str, Any]:
    """Croissant metadata of a card's front matter and summary; open fields are left out and listed."""
    complete = {name: value for name, value in metadata.items() if not is_open(value)}
    note = (f" DRAFT, left out because still to be completed: {', '.join(open_fields)}." if open_fields else "")
    # Croissant 1.0 prescribes this context: the URL of each of its names.
    context = json.loads((files(__package__) / "croissant_context.json").read_text("utf-8"))
    described: dict[str, Any] = {
        "@context": context, "@type": "sc:Dataset", "conformsTo": list(CONFORMS_TO),
        "name": complete.get("pretty_name", "not yet named"), "description": summary + note,
    }
    for ours, theirs in (("url", "url"), ("date_published", "datePublished"), ("version", "version"),
                         ("citation", "citeAs"), ("tags", "keywords"), ("language", "inLanguage")):
        if ours in complete:
            described[theirs] = complete[ours]
    name = complete.get("license")
    if licence := complete.get("license_link") if name == "other" else LICENCES.get(name or ""):
        described["license"] = licence
    if "creators" in complete:
        described["creator"] = [{"@type": "sc:Organization", "name": name} for name in complete["creators"]]
    described["distribution"] = [_file_set(number, row) for number, row in enumerate(complete.get("files", ()))]
    described["recordSet"] = [_record_set(name, metadata[name]) for name in _RECORDS if metadata.get(name)]
    described |= {name: value for name, value in complete.items() if name.startswith("rai:")}
    return {name: value for name, value in described.items() if value != []}


def _file_set(number: int, row: Mapping[str, str]) -> dict[str, Any]:
    """Files by their pattern, relative to the data set's folder."""
    pattern = row["pattern"]
    encoding = next((kind for ending, kind in _FORMATS.items() if pattern.endswith(ending)), "application/octet-stream")
    return {"@type": "cr:FileSet", "@id": f"files-{number}", "name": row["name"],
            "description": f"{row['name']}; relative to the data set's folder, which is not part of this metadata.",
            "encodingFormat": encoding, "includes": pattern}


def _record_set(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table of the card as records inside the metadata."""
    columns = list(rows[0])
    fields = [{"@type": "cr:Field", "@id": f"{name}/{column}", "name": f"{name}/{column}", "description": column,
               "dataType": "sc:Integer" if all(type(row[column]) is int for row in rows) else "sc:Text"}
              for column in columns]
    whole = {column for column, field in zip(columns, fields, strict=True) if field["dataType"] == "sc:Integer"}
    data = [{f"{name}/{column}": row[column] if column in whole else "not stated" if is_open(row[column])
             else str(row[column]) for column in columns} for row in rows]
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "description": _RECORDS[name], "field": fields,
            "data": data}
