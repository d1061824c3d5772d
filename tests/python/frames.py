"""Prints what a node of quorate applies, one JSON object per line, until Ctrl-C. Needs nothing but Python.

    python frames.py 127.0.0.1:7811 --after 42@9f3c52a80d1e7b64 --id mirror

The node needs a `frames_listen`. When the connection breaks it goes on where it was. Keep `seq@history` of what you have dealt with: --after goes on
there. The protocol is in docs/FORMAT.md.
"""

import argparse
import base64
import json
import os
import socket
import struct
import sys
import time
import zlib

BEGIN, ENTRIES, STATE_BEGIN, STATE_PART, STATE_END, HEARTBEAT, END = range(7)
OPERATIONS = [None, "insert", "update", "delete", "expire", "command"]
FINAL = {"COMPACTED", "OTHER_HISTORY", "AHEAD", "INVALID", "TOO_LARGE"}  # Trying again changes nothing.
HEARTBEAT_S, SILENCE_S = 5, 15  # A node that is silent for three heartbeats is gone.


class Message:
    def __init__(self, data):
        self.data, self.at = data, 0

    def numbers(self, form):
        self.at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, self.data, self.at - struct.calcsize("<" + form))

    def bytes(self):
        (length,) = self.numbers("Q")
        self.at += length
        return self.data[self.at - length : self.at]


def frame(message):
    return struct.pack("<II", 4 + len(message), zlib.crc32(message)) + message


def printable(name, data):
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {name + "_base64": base64.b64encode(data).decode()}


class Follower:
    def __init__(self, position, history, name, state):
        self.position, self.history, self.name, self.state = position, history, name.encode(), state
        self.unfinished, self.reason, self.back_off_s = [], None, 0.1

    def follow(self, address):
        """Follows until the connection breaks."""
        self.unfinished, self.reason = [], None  # Lines of a position of which more come. Until then they do not count.
        with socket.create_connection(address, SILENCE_S) as connection:
            start = (self.position, self.history, False, self.state, True, False)  # Not from now on; batched, not compressed.
            first = struct.pack("<I8sIQQ????QI", 0, b"QFRAMES\0", 1, *start, 1 << 20, HEARTBEAT_S * 1000)
            connection.sendall(frame(first + struct.pack("<Q", len(self.name)) + self.name + struct.pack("<Q", 0)))
            incoming = connection.makefile("rb")
            while self.reason is None and len(head := incoming.read(8)) == 8:
                length, checksum = struct.unpack("<II", head)
                data = incoming.read(length - 4)
                if zlib.crc32(data) != checksum:
                    raise ConnectionError("a frame is damaged, or broke off")
                before = self.position
                try:
                    self.take(Message(data))
                except BrokenPipeError:
                    os._exit(1)  # Nobody reads what is printed.
                if self.position != before:
                    connection.sendall(frame(struct.pack("<IQ", 1, self.position)))
                self.back_off_s = 0.1

    def take(self, message):
        (kind,) = message.numbers("I")
        if kind == BEGIN:
            _magic, _version, self.history, _is_full, _seq = message.numbers("8sIQIQ")
        elif kind == STATE_BEGIN:
            self.sum, self.items = 0, 0  # What came before is void.
        elif kind in (ENTRIES, STATE_PART):
            _compression, count, _raw_bytes = message.numbers("IIQ")
            entries = Message(message.bytes())
            if kind == STATE_PART:
                self.sum, self.items = zlib.crc32(entries.data, self.sum), self.items + count
            for _ in range(count):
                self.entry(entries, kind == STATE_PART)
        elif kind == STATE_END:
            seq, items, checksum = message.numbers("QQI")
            if (items, checksum) != (self.items, self.sum):
                raise ConnectionError("the state is not as it was sent")
            self.position = seq
        elif kind == HEARTBEAT:
            self.position = message.numbers("Q")[0]
        elif kind == END:
            message.numbers("I")  # The number of the reason.
            self.reason, words = message.bytes().decode(), message.bytes().decode()
            end = {"reason": self.reason, "message": words, "after": f"{self.position}@{self.history:016x}"}
            print(json.dumps(end | {"first_seq": message.numbers("Q")[0]}), file=sys.stderr, flush=True)
        sys.stdout.flush()

    def entry(self, entries, is_item):
        seq, _term, time_ms, _elapsed_ms, more, operation = entries.numbers("QQQQ?I")
        line = {"seq": seq, "history": f"{self.history:016x}", "time_ms": time_ms, "operation": OPERATIONS[operation]}
        if line["operation"] == "command":  # Of a machine that tells no events.
            entries.numbers("II")
            line |= printable("command", entries.bytes())
        else:
            line |= {"tenant": entries.bytes().decode(), "collection": entries.bytes().decode()}
            key, value, _numbers = entries.bytes(), entries.bytes(), entries.numbers("QQQQQI")
            line |= printable("key", key) | (printable("value", value) if operation < 3 else {})
        self.unfinished.append(line | ({"state": True} if is_item else {}))
        if not more:
            print("\n".join(map(json.dumps, self.unfinished)))
            self.unfinished.clear()
            self.position = self.position if is_item else seq

    def run(self, address):
        host, _, port = address.rpartition(":")
        while self.reason not in FINAL:
            try:
                self.follow((host.strip("[]"), int(port)))
            except OSError as error:
                print(f"{address}: {error}", file=sys.stderr)
            if self.reason not in FINAL:
                time.sleep(self.back_off_s)
                self.back_off_s = min(self.back_off_s * 2, 5)
        return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints what a node of quorate applies.")
    parser.add_argument("address", metavar="HOST:PORT", help="port for frames of any node")
    parser.add_argument("--after", metavar="SEQ[@HISTORY]", default="0", help="begin behind this position")
    parser.add_argument("--id", default="frames.py", help="name in the node's list of followers")
    parser.add_argument("--state", action="store_true", help="where the position is gone, take the state instead")
    given = parser.parse_args()
    seq, _, history = given.after.partition("@")
    try:
        sys.exit(Follower(int(seq), int(history or "0", 16), given.id, given.state).run(given.address))
    except KeyboardInterrupt:
        pass
