"""Hypothesis strategies from the protobuf descriptors: right, half-right and hostile messages, and mere bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]  # Any: what a field holds

INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}
DOUBLES = (0.0, -0.0, 1.5, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
# Becomes half of a surrogate pair on the wire, which no client in Python could send.
STAND_IN = "\ue000"
SURROGATE_HALF, HALF_A_PAIR = STAND_IN.encode(), b"\xed\xa0\x80"
TEXTS = (
    "",
    " ",
    "\x00",
    "a\x00b",
    f"a{STAND_IN}b",
    "\ufffe\U0010ffff",
    "\u202e\u0301",
    "../../etc/passwd",
    "'; DROP TABLE state.runs; --",
    "%s%n{0}{{input}}",
    "default",
    "a" * 63,
    "a" * 64,
    "ü" * 128,
    "a" * 129,
    "\n" * 1_001,
    "00000000-0000-0000-0000-000000000000",
    "01A20F61-31F6-7254-A0C7-B29527F68656",
    "01a20f61-31f6-7254-a0c7-b29527f6865g",
    "{01a20f61-31f6-7254-a0c7-b29527f68656}",
    "9" * 400,
)
JSONS = (
    b"{}",
    b'{"value":1}',
    b'{"value":null,"value":2}',
    b'{"\\u0000":"\\ud800"}',
    b'{"value":NaN}',
    b'{"value":1e999}',
    b'{"value":' + b"9" * 5_000 + b"}",
    b"[" * 900 + b"]" * 900,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b'{"value":"\xff\xfe"}',
    b"[]",
    b"null",
    b'{"value":',
    b"\x00",
    b'{"value":"' + b"\\u0041" * 20_000 + b'"}',
)
LENGTHS = (200, 70_000, 300_000)
REPEATS_MAX = 3
MANY = 300


@dataclass(frozen=True)
class Vocabulary:
    """The words that make a message right, by the name of the field; and the strategies made so far."""

    words: Mapping[str, Sequence[Any]]  # Any: what the field holds
    _made: dict[tuple[str, bool], Strategy] = field(default_factory=dict)

    def message(self, descriptor: Descriptor, *, is_right: bool = False) -> Strategy:
        """Messages of a type; right ones say nothing but what the vocabulary knows."""
        key = (descriptor.full_name, is_right)
        if key not in self._made:
            self._made[key] = st.deferred(lambda: self._messages(descriptor, is_right=is_right))
        return self._made[key]

    def wire(self, descriptor: Descriptor) -> st.SearchStrategy[bytes]:
        """Messages as they travel: a third of them right, one in six broken on the way."""
        messages = st.one_of(*(self.message(descriptor, is_right=is_right) for is_right in (True, False, False)))
        made = messages.map(lambda message: message.SerializeToString().replace(SURROGATE_HALF, HALF_A_PAIR))
        return st.integers(0, 5).flatmap(lambda fate: made if fate else st.one_of(*_breaks(made)))

    def _messages(self, descriptor: Descriptor, *, is_right: bool) -> Strategy:
        fields = [(each, self._field(each, is_right=is_right)) for each in descriptor.fields]

        @st.composite
        def messages(draw: Callable[[Strategy], Any]) -> Message:
            message = GetMessageClass(descriptor)()
            # Of ten fields: most messages are nearly whole, some have hardly anything.
            density = 10 if is_right else draw(st.sampled_from((10, 9, 9, 7, 3)))
            for each, strategy in fields:
                if density == 10 or draw(st.integers(0, 9)) < density:
                    _put(message, each, draw(strategy))
            return message

        return messages()

    def _field(self, each: FieldDescriptor, *, is_right: bool) -> Strategy:
        if each.message_type is not None and each.message_type.GetOptions().map_entry:
            key, value = (
                self._value(each.message_type.fields_by_name[name], is_right=is_right) for name in ("key", "value")
            )
            return st.dictionaries(key, value, max_size=REPEATS_MAX)
        one = self._value(each, is_right=is_right)
        if not each.is_repeated:
            return one
        some = st.lists(one, max_size=REPEATS_MAX)
        same = one.map(lambda item: [item, item])
        return st.integers(2 if is_right else 0, 20).flatmap(
            lambda fate: some if fate > 2 else same if fate else one.map(_many)
        )

    def _value(self, each: FieldDescriptor, *, is_right: bool) -> Strategy:
        if each.message_type is not None:
            return self.message(each.message_type, is_right=is_right)
        words = st.sampled_from(list(self.words.get(each.name) or _plain(each)))
        if is_right:
            return words
        hostile = _hostile(each)
        return (
            st.integers(0, 4).flatmap(lambda fate: words if fate else hostile) if each.name in self.words else hostile
        )


def _plain(each: FieldDescriptor) -> Sequence[Any]:  # Any: what the field holds
    """What a field without words of its own holds in a right message."""
    if each.enum_type is not None:
        return [number for number in each.enum_type.values_by_number if number]
    plain = {FieldDescriptor.TYPE_STRING: "text", FieldDescriptor.TYPE_BYTES: b'{"value":1}'}
    return [plain.get(each.type, 0)]


def _hostile(each: FieldDescriptor) -> Strategy:
    if each.enum_type is not None:
        return st.sampled_from([*each.enum_type.values_by_number, -1, 99, (1 << 31) - 1])
    if each.type in INTEGERS:
        low, high = INTEGERS[each.type]
        return st.sampled_from((0, 1, 2, 17, max(low, -1), low, high, high - 1))
    if each.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if each.type == FieldDescriptor.TYPE_DOUBLE:
        return st.sampled_from(DOUBLES)
    if each.type == FieldDescriptor.TYPE_BYTES:
        long = st.sampled_from(LENGTHS).map(lambda size: b'{"value":"' + b"x" * size + b'"}')
        return st.one_of(st.sampled_from(JSONS), st.sampled_from(JSONS), long, st.binary(max_size=20))
    assert each.type == FieldDescriptor.TYPE_STRING, each.full_name
    huge = st.sampled_from(LENGTHS).map(lambda size: "ä" * (size // 2))
    return st.one_of(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.text(max_size=8).map(_sendable), huge)


def _sendable(text: str) -> str:
    return text.encode(errors="surrogatepass").decode(errors="replace")


def _many(item: Any) -> list[Any]:
    """Many items, as long as they stay small; Any: what a repeated field holds."""
    size = item.ByteSize() if isinstance(item, Message) else len(str(item))
    return [item] * (MANY if size < 1_000 else REPEATS_MAX)


def _put(message: Message, each: FieldDescriptor, value: Any) -> None:  # Any: what the field holds
    if isinstance(value, dict):
        getattr(message, each.name).update(value)
    elif each.is_repeated:
        getattr(message, each.name).extend(value)
    elif each.message_type is not None:
        getattr(message, each.name).CopyFrom(value)
    else:
        setattr(message, each.name, value)


def _breaks(made: st.SearchStrategy[bytes]) -> Sequence[st.SearchStrategy[bytes]]:
    places = st.integers(0, 1 << 16)
    noise = st.binary(min_size=1, max_size=16)
    return (
        st.binary(max_size=64),
        st.tuples(made, places).map(lambda cut: cut[0][: cut[1] % (len(cut[0]) + 1)]),
        st.tuples(made, places, noise).map(lambda put: _overwritten(put[0], put[1] % (len(put[0]) + 1), put[2])),
        st.tuples(made, noise).map(lambda both: both[0] + both[1]),
        # Unknown fields: a group within a group within a group, and a length that nothing has.
        made.map(lambda data: data + b"\xfb\x3f" * 2_000),
        made.map(lambda data: data + b"\xfa\x3f\xff\xff\xff\xff\x07"),
        # Field 1 as a message in itself, deeper than parsers go.
        st.sampled_from((50, 150)).map(_nested),
    )


def _overwritten(data: bytes, place: int, noise: bytes) -> bytes:
    return data[:place] + noise + data[place + len(noise) :]


def _nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = b"\x0a" + _varint(len(data)) + data
    return data


def _varint(number: int) -> bytes:
    return bytes((number,)) if number < 128 else bytes((number & 127 | 128, number >> 7))
