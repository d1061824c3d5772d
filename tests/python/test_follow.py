"""A client in Python follows `replication.ReplicationService`: what it is told is what happened."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import unittest
import urllib.request

import grpc
import zstandard
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

import admin_pb2
import admin_pb2_grpc
import call_pb2
import kv_pb2
import replication_pb2 as wire
from node import DEADLINE_S, BreakingLine, Node, eventually

KEYS, VALUE_BYTES, OPERATIONS = 10_000, 492, 125
# What a client takes by default.
STOCK_BYTES = 4 * 1024 * 1024
# Names that are not given are this one.
DEFAULT = "default"


def put_of(key, value, collection=""):
    return kv_pb2.TxnOperation(collection=collection, put=kv_pb2.TxnPut(key=key, value=value))


def unpacked(message):
    """The entries in a message, which has none if it is a heartbeat."""
    if message.HasField("heartbeat"):
        return []
    if not message.HasField("batch"):
        return [message]
    encoded = message.batch.entries
    if message.batch.compression == wire.COMPRESSION_ZSTD:
        encoded = zstandard.decompress(encoded, max_output_size=message.batch.raw_bytes)
    assert len(encoded) == message.batch.raw_bytes
    entries = wire.Entries.FromString(encoded).entries
    assert len(entries) == message.batch.count
    return list(entries)


def bare(entries):
    """Entries without the history, which not every one names."""
    for entry in entries:
        entry.history = 0
    return entries


def places(entries):
    return [(entry.seq, entry.entity.collection, entry.entity.key) for entry in entries]


class Following:
    """Follows in a thread of its own, acknowledges each position, and remembers what it was told."""

    def __init__(self, node, **wishes):
        self.entries, self.largest, self.upto, self.histories, self.compressed = [], 0, None, set(), 0
        self.requests = queue.SimpleQueue()
        self.requests.put(wire.SubscribeRequest(**wishes))
        self.call = node.feed.Subscribe(iter(self.requests.get, None))
        self.error = None
        self.thread = threading.Thread(target=self.follow)
        self.thread.start()

    def follow(self):
        try:
            for message in self.call:
                self.largest = max(self.largest, message.ByteSize())
                self.compressed += message.batch.compression == wire.COMPRESSION_ZSTD
                entries = unpacked(message)
                upto = message.heartbeat.upto_seq if not entries else entries[-1].seq - entries[-1].more
                self.histories.update(each.history for each in [message, *entries] if each.history)
                self.entries += entries
                if upto != self.upto:
                    self.requests.put(wire.SubscribeRequest(ack_seq=upto))
                self.upto = upto
        except grpc.RpcError as error:
            self.error = error

    def until(self, seq):
        """Waits until everything up to `seq` has come, ends, and returns what has come."""
        eventually(lambda: self.error or (self.upto or 0) >= seq, f"what was applied up to {seq}")
        if self.error:
            raise self.error
        self.end()
        return self.entries

    def end(self):
        self.call.cancel()
        self.requests.put(None)
        self.thread.join(DEADLINE_S)


class FollowTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.node = Node()
        cls.addClassCleanup(cls.node.remove)
        # It follows while everything is written.
        cls.live = Following(cls.node, window_bytes=1 << 20)
        cls.addClassCleanup(cls.live.end)
        cls.write(cls.node)
        cls.last = cls.node.status().present_seq
        cls.told = bare(cls.live.until(cls.last))

    @staticmethod
    def write(node):
        for number in range(20):
            node.put(b"key %d" % (number % 7), b"value %d" % number, collection="orders", tenant="acme")
        request = kv_pb2.DeleteRequest(tenant="acme", collection="orders", key=b"key 3")
        assert node.kv.Delete(request, timeout=DEADLINE_S).deleted
        node.put(b"short-lived", b"\xff\x00", collection="orders", tenant="acme", ttl_ms=200)
        node.put(b"long-lived", b"", collection="orders", tenant="acme", ttl_ms=3_600_000)
        # Two collections at one position: the last of either is not followed by another one of its own.
        mixed = [("orders", b"a"), ("parts", b"a"), ("orders", b"b"), ("parts", b"b")]
        node.txn([put_of(key, b"of a transaction", collection) for collection, key in mixed], tenant="acme")
        for first in range(0, KEYS, OPERATIONS):
            keys = range(first, first + OPERATIONS)
            node.txn([put_of(b"%06d" % key, b"%06d" % key * (VALUE_BYTES // 6)) for key in keys])
        deleted = node.kv.DeleteRange(kv_pb2.DeleteRangeRequest(limit=KEYS), timeout=DEADLINE_S)
        assert (deleted.deleted, deleted.more) == (KEYS, False)
        node.put(b"large", os.urandom(1 << 20))
        key = kv_pb2.GetRequest(tenant="acme", collection="orders", key=b"short-lived")
        eventually(lambda: not node.kv.Get(key, timeout=DEADLINE_S).HasField("item"), "the key expires")

    def end_of(self, node, **wishes):
        """The reason for which a stream ends, decoded as `grpcio-status` does."""
        following = Following(node, **wishes)
        self.addCleanup(following.end)
        eventually(lambda: following.error, "the stream ends")
        return self.failure(following.error)

    def failure(self, error):
        status, failure = rpc_status.from_call(error), call_pb2.Failure()
        self.assertEqual(len(status.details), 1)
        self.assertTrue(status.details[0].Unpack(failure))
        self.assertEqual((failure.code, failure.message), (status.code, status.message))
        return call_pb2.Reason.Name(failure.reason), failure

    def test_entries_come_once_and_in_order(self):
        self.assertEqual(len(self.told), 20 + 1 + 3 + 4 + 2 * KEYS + 1)
        self.assertLess(self.live.largest, STOCK_BYTES)
        self.assertEqual(self.live.histories, {self.node.status().history})
        seq, more = 0, False
        for entry in self.told:
            self.assertEqual(entry.seq == seq, more, entry.seq)
            self.assertGreaterEqual(entry.seq, seq)
            seq, more = entry.seq, entry.more
        self.assertFalse(more)
        deleted = [entry.entity.key for entry in self.told if entry.operation == wire.Delete][1:]
        self.assertEqual(deleted, [b"%06d" % key for key in range(KEYS)])
        expired = [entry.entity.key for entry in self.told if entry.operation == wire.Expire]
        self.assertEqual(expired, [b"short-lived"])

    def test_the_state_that_entries_make_is_what_range_returns(self):
        state = {("acme", "orders"): {}, ("acme", "parts"): {}, (DEFAULT, DEFAULT): {}}
        for entry in self.told:
            entity, items = entry.entity, state[entry.tenant_id, entry.entity.collection]
            before = items.get(entity.key)
            if before:
                self.assertEqual(entity.previous_seq, before.mod_revision)
            self.assertEqual(before is None, entry.operation == wire.Insert)
            if entry.operation in (wire.Delete, wire.Expire):
                del items[entity.key]
                continue
            items[entity.key] = kv_pb2.Item(
                key=entity.key,
                value=entity.value,
                create_revision=entity.create_seq,
                mod_revision=entry.seq,
                version=entity.version,
                expires_ms=entity.expires_ms,
            )
        self.assertEqual([len(items) for items in state.values()], [9, 2, 1])
        for (tenant, collection), items in state.items():
            self.assertEqual(items, self.node.items(tenant, collection))

    def test_whatever_way_they_are_asked_for_entries_are_the_same(self):
        for limit in (0, 7):
            self.assertEqual(bare(self.node.entries(limit=limit)), self.told)
        ways = [{}, {"batched": True}, {"batched": True, "compression": wire.COMPRESSION_ZSTD}]
        ways += [{"window_bytes": 1 << 16}, {"window_bytes": 1 << 16, "batched": True}]
        for way in ways:
            with self.subTest(way):
                following = Following(self.node, **way)
                self.addCleanup(following.end)
                self.assertEqual(bare(following.until(self.last)), self.told)
                self.assertLess(following.largest, STOCK_BYTES)
                self.assertEqual(following.compressed > 0, "compression" in way)
        middle = self.told[len(self.told) // 2].seq
        following = Following(self.node, from_seq=middle, history=self.node.status().history)
        self.addCleanup(following.end)
        self.assertEqual(bare(following.until(self.last)), [entry for entry in self.told if entry.seq > middle])

    def test_filters_let_pass_what_they_name(self):
        orders = wire.Filter(tenant_id="acme", collection="orders")
        parts = wire.Filter(tenant_id="acme", collection="parts")
        acme = wire.Filter(tenant_id="acme")
        nobody = wire.Filter(tenant_id="nobody")
        cases = [([orders], ["orders"]), ([parts, nobody], ["parts"]), ([acme], ["orders", "parts"])]
        for filters, collections in cases:
            with self.subTest(collections):
                following = Following(self.node, filters=filters)
                self.addCleanup(following.end)
                told = bare(following.until(self.last))
                wanted = [entry for entry in self.told if entry.entity.collection in collections]
                self.assertEqual(places(told), places(wanted))
                for entry, after in zip(told, [*told[1:], None]):
                    self.assertEqual(entry.more, after is not None and after.seq == entry.seq, entry.seq)
                self.assertEqual(told, bare(self.node.entries(filters=filters)))

    def test_what_is_new_from_now_on(self):
        node = Node()
        self.addCleanup(node.remove)
        before = node.put(b"before", b"")
        following = Following(node, from_now=True)
        self.addCleanup(following.end)
        eventually(lambda: following.error or following.upto is not None, "the first heartbeat")
        self.assertEqual(following.entries, [])
        self.assertGreaterEqual(following.upto, before)
        after = [node.put(b"after", b"%d" % number) for number in range(3)]
        self.assertEqual([entry.seq for entry in following.until(after[-1])], after)
        status = node.status()
        self.assertTrue(status.healthy)
        self.assertEqual((status.role, status.node_id, status.leader), ("leader", 1, node.client))
        self.assertGreaterEqual(status.current_seq, after[-1])

        following = Following(node, from_now=True)
        self.addCleanup(following.end)
        eventually(lambda: following.error or following.upto is not None, "the first heartbeat")
        node.process.send_signal(signal.SIGTERM)
        eventually(lambda: following.error, "the stream ends")
        self.assertEqual(self.failure(following.error)[0], "REASON_STOPPED")

    def test_a_place_that_is_none_ends_with_a_reason(self):
        history = self.node.status().history
        self.assertEqual(self.end_of(self.node, from_seq=5, history=history ^ 1)[0], "REASON_OTHER_HISTORY")
        self.assertEqual(self.end_of(self.node, from_seq=1_000_000_000)[0], "REASON_AHEAD")
        self.assertEqual(self.end_of(self.node, heartbeat_ms=1)[0], "REASON_INVALID")
        with self.assertRaises(grpc.RpcError) as raised:
            list(self.node.feed.Subscribe(iter([wire.SubscribeRequest(from_now=True)]), timeout=1))
        self.assertEqual(self.failure(raised.exception)[0], "REASON_DEADLINE_EXCEEDED")
        for request, reason in [
            (wire.EntriesRequest(after_seq=5, history=history ^ 1), "REASON_OTHER_HISTORY"),
            (wire.EntriesRequest(after_seq=1_000_000_000), "REASON_AHEAD"),
        ]:
            with self.assertRaises(grpc.RpcError) as raised:
                self.node.feed.GetEntriesAfter(request, timeout=DEADLINE_S)
            self.assertEqual(self.failure(raised.exception)[0], reason)

    def test_a_place_that_is_gone_is_told_with_the_first_that_is_there(self):
        node = Node("--event-log-operations", "1000", "--event-log-bytes", str(4 << 20))
        self.addCleanup(node.remove)
        # The newest 8 MiB are in memory.
        for number in range(20):
            node.put(b"key", os.urandom(1_000_000))

        def first():
            first = node.status().first_seq
            return first if first > 1 else None

        eventually(first, "the beginning is forgotten")
        reason, failure = self.end_of(node)
        self.assertEqual(reason, "REASON_COMPACTED")
        self.assertGreater(failure.first_revision, 1)
        following = Following(node, from_seq=failure.first_revision - 1)
        self.addCleanup(following.end)
        following.until(node.status().present_seq)

    def test_reflection_names_the_service(self):
        database = ProtoReflectionDescriptorDatabase(self.node.channel)
        self.assertIn("replication.ReplicationService", database.get_services())
        described = database.FindFileContainingSymbol("replication.ReplicationService")
        methods = [method.name for service in described.service for method in service.method]
        self.assertEqual(methods, ["Subscribe", "GetStatus", "ReadSnapshot", "GetEntriesAfter"])


class FollowExampleTest(unittest.TestCase):
    """The program in docs/examples, as users run it."""

    program = "docs/examples/follow.py"

    def port(self):
        """What it is given."""
        return self.node.client

    def setUp(self):
        self.node = Node()
        self.addCleanup(self.node.remove)
        self.output = os.path.join(self.node.directory, "followed")

    def run_example(self, *arguments, address=None, **how):
        # Whoever runs in the background has interrupts ignored, and so would what it starts. A function that runs in the child
        # would do, too, but then this process is forked, and gRPC's threads in the fork sometimes end it before it is the example.
        command = ["env", "--default-signal=INT", sys.executable, self.program, address or self.port(), *arguments]
        example = subprocess.Popen(command, stdin=subprocess.DEVNULL, **how)
        self.addCleanup(example.wait)
        self.addCleanup(example.kill)
        return example

    def start_example(self, *arguments, address=None):
        with open(self.output, "wb") as output:
            return self.run_example(*arguments, address=address, stdout=output, stderr=subprocess.DEVNULL)

    def stop_example(self, example, last):
        """Once it has printed what happened at `last`: what it has printed."""
        eventually(lambda: any(line["seq"] == last for line in self.followed()[-1:]), "the last entry")
        example.send_signal(signal.SIGINT)
        self.assertEqual(example.wait(DEADLINE_S), 0)
        return self.followed()

    def followed(self):
        with open(self.output) as output:
            return [json.loads(line) for line in output if line.endswith("\n")]

    def test_it_goes_on_where_it_was_when_the_node_was_killed(self):
        example = self.start_example()
        for round in range(3):
            for number in range(60):
                self.node.txn([put_of(b"%d" % key, b"\xff%d" % number) for key in range(50)])
                if number == 30 * round:
                    eventually(self.followed, "the example has begun")
            self.node.end(signal.SIGKILL)
            self.node.start()
        last = self.node.put(b"the last", "größer".encode())
        lines, entries = self.stop_example(example, last), self.node.entries()
        self.assertEqual(len(lines), 3 * 60 * 50 + 1)
        self.assertEqual([line["seq"] for line in lines], [entry.seq for entry in entries])
        self.assertEqual([line["key"].encode() for line in lines], [entry.entity.key for entry in entries])
        self.assertEqual((lines[-1]["operation"], lines[-1]["value"]), ("insert", "größer"))
        self.assertEqual(lines[0]["value_base64"], "/zA=")
        self.assertEqual({int(line["history"], 16) for line in lines}, {self.node.status().history})

    def test_a_position_that_broke_off_in_the_middle_is_printed_once(self):
        for first in range(0, KEYS, OPERATIONS):
            before = self.node.txn([put_of(b"%06d" % key, b"") for key in range(first, first + OPERATIONS)])
        self.node.kv.DeleteRange(kv_pb2.DeleteRangeRequest(limit=KEYS), timeout=DEADLINE_S)
        last = self.node.put(b"the last", b"")
        line = BreakingLine(self.port(), [300_000, 400_000])
        self.addCleanup(line.close)
        example = self.start_example("--after", str(before), address=line.address)
        lines = self.stop_example(example, last)
        self.assertEqual(line.connections, 3)
        self.assertEqual([line["key"] for line in lines], ["%06d" % key for key in range(KEYS)] + ["the last"])

    def test_it_ends_with_the_reason(self):
        history = self.node.status().history
        for after, reason in [("1000000", "AHEAD"), (f"1@{history ^ 1:x}", "OTHER_HISTORY")]:
            example = self.run_example("--after", after, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            printed, told = example.communicate(timeout=DEADLINE_S)
            self.assertEqual((example.returncode, printed), (1, b""))
            self.assertEqual(json.loads(told)["reason"].removeprefix("REASON_"), reason)


class FramesTest(FollowExampleTest):
    """The same without gRPC, by a follower that goes on by itself and takes states."""

    program = "tests/python/frames.py"

    def port(self):
        return self.node.frames

    def test_a_state_leads_over_where_the_position_is_gone(self):
        for number in range(3000):
            self.node.put(b"%d" % (number % 2000), b"%d" % number)
        self.node.put(b"last of the state", b"", collection="c", tenant="t", ttl_ms=3_600_000)
        admin_pb2_grpc.AdminStub(self.node.channel).Snapshot(admin_pb2.SnapshotRequest(), timeout=DEADLINE_S)
        self.node.end()
        shutil.rmtree(os.path.join(self.node.data, "events"))
        self.node.start()
        gone = self.run_example(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        printed, told = gone.communicate(timeout=DEADLINE_S)
        end = json.loads(told.splitlines()[-1])
        self.assertEqual((gone.returncode, printed, end["reason"]), (1, b"", "COMPACTED"), told)
        first = end["first_seq"]
        self.assertGreater(first, 3000)
        example = self.start_example("--state")
        eventually(lambda: len(self.followed()) >= 2001, "the state")
        last = self.node.put(b"the last", b"")
        lines = self.stop_example(example, last)
        state, after = [line for line in lines if "state" in line], [line for line in lines if "state" not in line]
        self.assertEqual({int(line["key"]): int(line["value"]) for line in state if line["tenant"] == DEFAULT}, {
            key: key + 2000 if key < 1000 else key for key in range(2000)
        })
        self.assertEqual([line["key"] for line in state if line["tenant"] == "t"], ["last of the state"])
        self.assertEqual([line["key"] for line in after], ["the last"])
        self.assertEqual(len({line["seq"] for line in state}), 1)
        self.assertGreaterEqual(state[0]["seq"] + 1, first)


class FramesExampleTest(unittest.TestCase):
    """The shortest follower there is, in docs/examples, as users run it."""

    def setUp(self):
        self.node = Node()
        self.addCleanup(self.node.remove)

    def start_example(self, *arguments):
        command = [sys.executable, "docs/examples/frames.py", self.node.frames, *arguments]
        example = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(example.communicate)
        self.addCleanup(example.kill)
        return example

    def acknowledged(self):
        """The positions that the node's followers have taken, by their names."""
        with urllib.request.urlopen(f"http://{self.node.client}/replication/replicas", timeout=DEADLINE_S) as page:
            return {row["id"]: row["offset"] for row in json.load(page)["replicas"]}

    def test_it_prints_what_is_applied_and_acknowledges_it(self):
        for number in range(100):
            self.node.txn([put_of(b"%d" % key, b"\xff%d" % number) for key in range(20)])
        self.node.kv.DeleteRange(kv_pb2.DeleteRangeRequest(limit=7), timeout=DEADLINE_S)
        last = self.node.put(b"the last", b"its value")
        entries, history = self.node.entries(), self.node.status().history
        places = [f"{entry.seq}@{history:016x}" for entry in entries]
        example = self.start_example()
        lines = [example.stdout.readline().decode().split(maxsplit=3) for _ in entries]
        self.assertEqual([line[0] for line in lines], places)
        names = {1: "insert", 2: "update", 3: "delete"}
        self.assertEqual([line[2] for line in lines], [names[entry.operation] for entry in entries])
        self.assertIn("b'the last', b'its value'", lines[-1][3])
        eventually(lambda: self.acknowledged().get("demo") == last, "all is acknowledged")

        # It goes on behind the line that it is given.
        middle = next(place for place, entry in zip(places, entries) if place != places[0] and not entry.more)
        again = self.start_example(middle)
        rest = places[len(places) - places[::-1].index(middle) :]
        self.assertEqual([again.stdout.readline().decode().split()[0] for _ in rest], rest)

    def test_it_ends_with_the_reason(self):
        example = self.start_example("1000000")
        printed, told = example.communicate(timeout=DEADLINE_S)
        self.assertEqual((example.returncode, printed), (1, b""))
        self.assertTrue(told.startswith(b"AHEAD: "), told)


if __name__ == "__main__":
    unittest.main()
