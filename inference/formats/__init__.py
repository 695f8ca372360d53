"""Drafter formats of other engines: what is read, what is written, and which one a directory has."""

from draftsmith.inference.formats.convert import FORMATS, convert, read_drafter
from draftsmith.inference.formats.detect import detect
from draftsmith.inference.formats.record import DrafterRecord, LMFields, MedusaFields

__all__ = ["FORMATS", "DrafterRecord", "LMFields", "MedusaFields", "convert", "detect", "read_drafter"]
