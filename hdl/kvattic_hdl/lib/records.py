"""Fields of `kvattic.spec.commands` records as Amaranth values: no offset is ever written twice."""

from amaranth.hdl import Cat, Const, Value, ValueLike

from kvattic.spec.commands import TABLE_ENTRY, Field, Record, TableFlag

WORD_BYTES = 8
"""Bytes of one beat of the host bus."""


def word_of(field: Field) -> int:
    """Number of the host-bus word that holds this field.

    Raises
    ------
    ValueError
        The field lies in more than one word.
    """
    first, last = field.offset // WORD_BYTES, (field.offset + field.size - 1) // WORD_BYTES
    if first != last:
        raise ValueError(f"field must lie in one word of {WORD_BYTES} bytes, not {field!r}")
    return first


def field_of_word(word: Value, field: Field) -> Value:
    """The field's bits out of the word that `word_of` names."""
    word_of(field)
    return word[field.offset % WORD_BYTES * 8 :][: field.size * 8]


def fields(record: Record, line: ValueLike) -> dict[str, Value]:
    """All fields of the record by name, out of its bytes (byte 0 in the lowest bits).

    Raises
    ------
    ValueError
        `line` has not the record's size.
    """
    line = Value.cast(line)
    if len(line) != record.size * 8:
        raise ValueError(
            f"line must be {record.size * 8} bits for a {record.name}, not {len(line)}"
        )
    return {f.name: line[f.offset * 8 :][: f.size * 8] for f in record.fields}


def table_entry(line: ValueLike) -> dict[str, Value]:
    """The fields of a `commands.TABLE_ENTRY`, and its flags: dram, whole, and what must be zero: reserved."""
    entry = fields(TABLE_ENTRY, line)
    flags = entry.pop("flags")
    named = {flag.name.lower(): flags[flag.bit_length() - 1] for flag in TableFlag if flag.name}
    return entry | named | {"reserved": flags[max(TableFlag).bit_length() :]}


def assemble(record: Record, **values: ValueLike) -> Value:
    """The record's bytes, byte 0 lowest; signed values are extended, what is not given is zero.

    Raises
    ------
    ValueError
        A value is wider than its field.
    KeyError
        The record has no such field.
    """
    parts: list[Value] = []
    position = 0
    chosen = sorted((record[name] for name in values), key=lambda field: field.offset)
    for field in chosen:
        value = Value.cast(values[field.name])
        bits = field.size * 8
        if len(value) > bits:
            raise ValueError(
                f"{record.name}.{field.name} must be at most {bits} bits, not {len(value)}"
            )
        fill = (
            value[-1].replicate(bits - len(value))
            if value.shape().signed
            else Const(0, bits - len(value))
        )
        parts += [Const(0, field.offset * 8 - position), value, fill]
        position = (field.offset + field.size) * 8
    parts.append(Const(0, record.size * 8 - position))
    return Cat(parts)
