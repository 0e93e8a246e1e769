"""arrow_types: one type for a column that several writers laid out differently, and arrays of it.

In: types. Out: the type that holds the values of all of them without loss, or None; arrays cast to
it. Values never pass through Python, which lacks some. Views become plain strings, bytes and lists:
Arrow's ``take`` knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

_LISTS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Field], pa.DataType]], ...] = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_),
    (pa.types.is_large_list_view, pa.large_list),
)
"""Kinds of lists, and what each is carried as."""
_UNITS = ("s", "ms", "us", "ns")
_UTC = frozenset({"UTC", "Etc/UTC", "+00:00", "Z"})
_EXACT_BITS = {16: 11, 32: 24, 64: 53}
"""Of floats by their width: whole numbers of so many bits are exact."""
_MAX_DIGITS = (38, 76)


def is_list(kind: pa.DataType) -> bool:
    """Whether ``kind`` is a list in any layout."""
    return pa.types.is_fixed_size_list(kind) or any(is_a(kind) for is_a, _ in _LISTS)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """``kind`` without what varies by writer, at any depth: plain types for views, and one width of
    dictionary indices, which pandas chooses by the number of categories."""
    if kind in (pa.string_view(), pa.binary_view()):
        return pa.string() if kind == pa.string_view() else pa.binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(pa.int32(), plain_type(kind.value_type), kind.ordered)
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(plain_type(each.type)) for each in kind])
    if pa.types.is_map(kind):
        key = kind.key_field.with_type(plain_type(kind.key_type))
        item = kind.item_field.with_type(plain_type(kind.item_type))
        return pa.map_(key, item, keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(plain_type(kind.value_type)), kind.list_size)
    for is_a, make in _LISTS:
        if is_a(kind):
            return make(kind.value_field.with_type(plain_type(kind.value_type)))
    return kind


def large_type(kind: pa.DataType) -> pa.DataType:
    """``kind`` with offsets of 64 bits: one array may hold more than 2 GiB of text or bytes."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return pa.large_string() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(large_type(each.type)) for each in kind])
    if is_list(kind) and not pa.types.is_fixed_size_list(kind):
        return pa.large_list(kind.value_field.with_type(large_type(kind.value_type)))
    return kind


def united(one: pa.DataType, other: pa.DataType, *, nested: bool = False) -> pa.DataType | None:
    """The type that holds each value of both types as it is; None if there is none.

    Of timestamps and durations it is the finer unit, outside of nested types only: whether the
    coarser values fit into it, ``coarser_unit`` leaves to the caller.
    """
    one, other = plain_type(one), plain_type(other)
    if one == other:
        return one
    for first, second in ((one, other), (other, one)):
        if pa.types.is_null(first):
            return second
        if isinstance(first, pa.BaseExtensionType):
            return united(first.storage_type, second, nested=nested)
        if pa.types.is_dictionary(first) and not pa.types.is_dictionary(second):
            return united(first.value_type, second, nested=nested)
    if pa.types.is_dictionary(one):
        values = united(one.value_type, other.value_type, nested=nested)
        both_ordered = one.ordered and other.ordered
        return None if values is None else pa.dictionary(pa.int32(), values, both_ordered)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _united_structs(one, other)
    if pa.types.is_map(one) or pa.types.is_map(other):
        return _united_maps(one, other)
    if is_list(one) and is_list(other):
        return _united_lists(one, other)
    if pa.types.is_timestamp(one) or pa.types.is_duration(one):
        return None if nested else _united_moments(one, other)
    return _united_scalars(one, other)


def coarser_unit(kind: pa.DataType, than: pa.DataType) -> int:
    """How many units of time of ``than`` make one of ``kind``; 1 unless that is the coarser one."""
    counts = (pa.types.is_timestamp, pa.types.is_duration)
    if not any(is_a(kind) and is_a(than) for is_a in counts):
        return 1
    steps = max(0, _UNITS.index(than.unit) - _UNITS.index(kind.unit))
    return int(1000**steps)


def _united_fields(one: pa.Field, other: pa.Field) -> pa.Field | None:
    kind = united(one.type, other.type, nested=True)
    return None if kind is None else pa.field(one.name, kind, one.nullable or other.nullable)


def _united_structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Fields of the same names, in the first one's order."""
    theirs = {each.name: each for each in other}
    if {each.name for each in one} != theirs.keys() or one.num_fields != other.num_fields:
        return None  # of two fields with one name neither can be found
    fields = [_united_fields(each, theirs[each.name]) for each in one]
    held = [each for each in fields if each is not None]
    return pa.struct(held) if len(held) == one.num_fields == len(theirs) else None


def _united_maps(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_map(one) and pa.types.is_map(other)):
        return None
    key = _united_fields(one.key_field, other.key_field)
    item = _united_fields(one.item_field, other.item_field)
    if key is None or item is None:
        return None
    return pa.map_(key, item, keys_sorted=one.keys_sorted and other.keys_sorted)


def _united_lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    item = _united_fields(one.value_field, other.value_field)
    if item is None:
        return None
    fixed = {kind.list_size for kind in (one, other) if pa.types.is_fixed_size_list(kind)}
    if len(fixed) == 1 and all(pa.types.is_fixed_size_list(kind) for kind in (one, other)):
        return pa.list_(item, *fixed)
    is_large = any(pa.types.is_large_list(kind) for kind in (one, other))
    return pa.large_list(item) if is_large else pa.list_(item)


def _united_moments(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if one.id != other.id:
        return None
    unit = max(one.unit, other.unit, key=_UNITS.index)
    if pa.types.is_duration(one):
        return pa.duration(unit)
    if one.tz == other.tz:
        return pa.timestamp(unit, one.tz)
    return pa.timestamp(unit, "UTC") if {one.tz, other.tz} <= _UTC else None


def _united_scalars(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = {one, other}
    if kinds <= {pa.string(), pa.large_string()}:
        return pa.large_string()
    if all(_is_bytes(kind) for kind in kinds):
        return pa.large_binary() if pa.large_binary() in kinds else pa.binary()
    if all(pa.types.is_time(kind) for kind in kinds):
        unit = max(one.unit, other.unit, key=_UNITS.index)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    if all(pa.types.is_date(kind) for kind in kinds):
        return pa.date32()
    if all(pa.types.is_decimal(kind) for kind in kinds):
        return _united_decimals(one, other)
    if all(pa.types.is_integer(kind) for kind in kinds):
        return _united_integers(one, other)
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return _united_floats(one, other)
    return None


def _is_bytes(kind: pa.DataType) -> bool:
    plain = kind in (pa.binary(), pa.large_binary())
    return plain or bool(pa.types.is_fixed_size_binary(kind))


def _united_decimals(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    scale = max(one.scale, other.scale)
    digits = max(one.precision - one.scale, other.precision - other.scale) + scale
    if digits > _MAX_DIGITS[1]:
        return None
    return (
        pa.decimal128(digits, scale) if digits <= _MAX_DIGITS[0] else pa.decimal256(digits, scale)
    )


def _united_integers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    signed = [kind.bit_width for kind in (one, other) if pa.types.is_signed_integer(kind)]
    unsigned = [kind.bit_width for kind in (one, other) if pa.types.is_unsigned_integer(kind)]
    if not signed or not unsigned:
        return max(one, other, key=lambda kind: kind.bit_width)
    bits = max(*signed, *(2 * width for width in unsigned))
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits)


def _united_floats(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    needed = [
        next((width for width, exact in _EXACT_BITS.items() if kind.bit_width <= exact), None)
        if pa.types.is_integer(kind)
        else kind.bit_width
        for kind in (one, other)
    ]
    widths = [width for width in needed if width is not None]
    if len(widths) < len(needed):
        return None
    return {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}[max(widths)]


def conformed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """``column`` as ``kind``, which is ``united`` of its type and others.

    Raises:
        pyarrow.ArrowInvalid: a value does not fit, or a chunk is too large for 32-bit offsets.
    """
    return pa.chunked_array([_conformed(chunk, kind) for chunk in column.chunks], kind)


def _conformed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if isinstance(array.type, pa.BaseExtensionType):
        return _conformed(array.storage, kind)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _conformed(array, kind.storage_type))
    if pa.types.is_dictionary(array.type):
        if not pa.types.is_dictionary(kind):
            return _conformed(array.dictionary_decode(), kind)
        values = _conformed(array.dictionary, kind.value_type)
        indices = array.indices.cast(kind.index_type)
        return pa.DictionaryArray.from_arrays(indices, values, ordered=kind.ordered)
    if pa.types.is_struct(kind):
        names = [each.name for each in array.type]
        parts = dict(zip(names, array.flatten(), strict=True))
        children = [_conformed(parts[each.name], each.type) for each in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_map(kind) or is_list(kind):
        return _conformed_list(array, kind)
    return array.cast(kind)


def _conformed_list(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Built anew from the items that are used: slices and views share more than their own."""
    missing = array.is_null()
    if pa.types.is_fixed_size_list(kind):
        used = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        items = _conformed(used, kind.value_type)
        return pa.FixedSizeListArray.from_arrays(items, type=kind, mask=missing)
    if pa.types.is_map(array.type):
        array = array.view(pa.list_(pa.struct([array.type.key_field, array.type.item_field])))
    lengths = array.value_lengths().fill_null(0).cast(pa.int64())
    is_large = pa.types.is_large_list(kind)
    ends = pc.cumulative_sum(lengths)
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    offsets = offsets if is_large else offsets.cast(pa.int32())
    items = array.flatten()
    if pa.types.is_map(kind):
        keys, values = items.flatten()
        return pa.MapArray.from_arrays(
            offsets,
            _conformed(keys, kind.key_type),
            _conformed(values, kind.item_type),
            type=kind,
            mask=missing,
        )
    make = pa.LargeListArray if is_large else pa.ListArray
    return make.from_arrays(offsets, _conformed(items, kind.value_type), type=kind, mask=missing)
