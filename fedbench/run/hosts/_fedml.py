"""FedML's cross-silo runtime: its server's and client's managers over its gRPC, carrying letters as opaque bytes.

The managers keep FedML's message types, addresses and channel. The rounds are not theirs: what a letter asks for is
answered by `fedbench.run.hosts.silo`. Two things of the channel are done here in FedML's place. Its loop for what
arrives takes a whole core to wait, and it unpickles whatever comes in; here it waits for a message, and takes nothing
out of a pickle but plain values and FedML's own class of messages.

Importing this module imports FedML, which takes seconds.
"""

from __future__ import annotations

import io
import json
import pickle
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from fedml.core.distributed.communication.grpc.grpc_comm_manager import GRPCCommManager
from fedml.core.distributed.communication.message import Message
from fedml.core.mlops import MLOpsStore
from fedml.cross_silo.client.fedml_client_master_manager import ClientMasterManager
from fedml.cross_silo.server.fedml_server_manager import FedMLServerManager
from fedml.cross_silo.server.message_define import MyMessage

from fedbench.errors import FedbenchError, MessageError
from fedbench.run.hosts.addresses import Address, try_to_listen
from fedbench.run.hosts.hub import Hub
from fedbench.run.hosts.letters import Joiner, cut, seal, unseal
from fedbench.run.hosts.silo import Silo

LETTER = MyMessage.MSG_ARG_KEY_MODEL_PARAMS
"""What FedML keeps out of its log."""
HELLO_SECONDS = 1.0


class _PlainUnpickler(pickle.Unpickler):
    """Reads FedML's messages of plain values, and runs no code that a sender chose."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (Message.__module__, Message.__qualname__):
            return Message
        raise pickle.UnpicklingError(f"a message holds a {module}.{name}")


class _Channel(GRPCCommManager):  # type: ignore[misc]
    """FedML's gRPC channel, with a loop that waits, reads no foreign classes, and counts bytes."""

    received_bytes, received_messages = 0, 0

    def message_handling_subroutine(self) -> None:
        while self.is_running:
            try:
                pickled = self.grpc_servicer.message_q.get(timeout=0.2)
            except queue.Empty:
                continue
            self.received_bytes += len(pickled)
            self.received_messages += 1
            try:
                message = _PlainUnpickler(io.BytesIO(pickled)).load()
                known = int(message.get_sender_id()) in self.grpc_mappings
            except Exception:  # anybody can send anything here
                continue
            if known:
                self.notify(message)


def _arguments(addresses: list[Address], table: Path, rank: int) -> Any:
    """What FedML's managers ask of its settings; nothing is logged anywhere else, nor looked up."""
    silos = [address.rank for address in addresses[1:]]
    settings = SimpleNamespace(
        training_type="cross_silo",
        scenario="horizontal",
        backend="GRPC",
        grpc_ipconfig_path=str(table),
        rank=rank,
        role="client" if rank else "server",
        client_id_list=json.dumps([rank] if rank else silos),
        client_num_in_total=len(silos),
        client_num_per_round=len(silos),
        comm_round=0,  # FedML counts no rounds here
        run_id="0",
        using_mlops=False,
        enable_tracking=False,
        enable_wandb=False,
        sys_perf_profiling=False,
    )
    MLOpsStore.mlops_args = settings  # else FedML reads the command line for them, and looks its own hosts up
    try_to_listen(addresses[rank])
    return settings


def _listen(manager: Any) -> None:
    """Open the channel of a manager."""
    size = len(manager.table)
    manager.com_manager = _Channel(manager.args.grpc_ipconfig_path, "fedml", manager.rank, size, manager.args)
    manager.com_manager.add_observer(manager)


def _sizes(message: Any, piece: bytes) -> int:
    """Bytes of a message as FedML sends it, but for gRPC's own framing."""
    empty = Message(message.get_type(), message.get_sender_id(), message.get_receiver_id())
    return len(pickle.dumps(empty)) + len(piece)


class _ServerManager(FedMLServerManager):  # type: ignore[misc]
    """FedML's server of silos, which hands letters to the hub."""

    def __init__(self, args: Any, addresses: list[Address], hub: Hub) -> None:
        self.hub, self.table = hub, addresses
        self.joiners: dict[int, Joiner] = {}
        super().__init__(args, aggregator=None, client_rank=0, client_num=len(addresses), backend="GRPC")

    def _init_manager(self) -> None:
        _listen(self)

    def handle_message_connection_ready(self, message: Any) -> None:
        """FedML asks its clients here whether they are there; `ServerCarrier` does."""

    def handle_message_client_status_update(self, message: Any) -> None:
        if message.get(MyMessage.MSG_ARG_KEY_CLIENT_STATUS) == self.ONLINE_STATUS_FLAG:
            self.hub.came(int(message.get_sender_id()), message.get(LETTER))

    def handle_message_receive_model_from_client(self, message: Any) -> None:
        silo = int(message.get_sender_id())
        try:
            letter = self.joiners.setdefault(silo, Joiner()).add(message.get(LETTER))
        except MessageError:
            return  # the silo is asked again or left out when its time is up
        if letter is not None:
            self.hub.arrived(silo, letter)


class ServerCarrier:
    """Carries a hub's letters to silos over FedML; one thread a silo sends, another listens."""

    def __init__(self, hub: Hub, addresses: list[Address], table: Path) -> None:
        self.hub, self.sent = hub, {"messages": 0, "bytes": 0}
        self.manager = _ServerManager(_arguments(addresses, table, 0), addresses, hub)
        self._lock = threading.Lock()
        self._outgoing: dict[int, queue.Queue[tuple[int, int, bytes] | None]] = {}  # kind, question, letter
        self._senders = []
        for address in addresses[1:]:
            self._outgoing[address.rank] = queue.Queue()
            sender = threading.Thread(target=self._send_all, args=(address.rank,), daemon=True)
            self._senders.append(sender)
        self._listener = threading.Thread(target=self.manager.run, daemon=True)
        for thread in (self._listener, *self._senders):
            thread.start()
        for silo in self._outgoing:  # one that was there before this server says hello again
            self._outgoing[silo].put((MyMessage.MSG_TYPE_S2C_CHECK_CLIENT_STATUS, 0, b""))

    def send(self, silo: int, number: int, letter: bytes) -> None:
        self._outgoing[silo].put((MyMessage.MSG_TYPE_S2C_SYNC_MODEL_TO_CLIENT, number, letter))

    def welcome(self, silo: int, letter: bytes) -> None:
        self._outgoing[silo].put((MyMessage.MSG_TYPE_S2C_INIT_CONFIG, 0, letter))

    def _send_all(self, silo: int) -> None:
        while (item := self._outgoing[silo].get()) is not None:
            kind, number, letter = item
            try:
                for piece in cut(letter):
                    message = Message(kind, 0, silo)
                    message.add_params(LETTER, piece)
                    self.manager.send_message(message)
                    with self._lock:
                        self.sent["messages"] += 1
                        self.sent["bytes"] += _sizes(message, piece)
            except grpc.RpcError as error:
                if number:
                    self.hub.unreachable(silo, number, f"it cannot be reached ({error.code().name.lower()})")

    def bytes_carried(self) -> Mapping[str, Mapping[str, int]]:
        channel = self.manager.com_manager
        return {"down": dict(self.sent), "up": {"messages": channel.received_messages, "bytes": channel.received_bytes}}

    def close(self, silos: Sequence[int]) -> None:
        for silo, outgoing in self._outgoing.items():
            if silo in silos:
                outgoing.put((MyMessage.MSG_TYPE_S2C_FINISH, 0, b""))
            outgoing.put(None)
        for sender in self._senders:
            sender.join(5)
        self.manager.finish()
        self._listener.join(5)


class SiloManager(ClientMasterManager):  # type: ignore[misc]
    """FedML's client, which answers letters. `run` returns when the server has ended the run."""

    def __init__(
        self,
        number: int,
        addresses: list[Address],
        table: Path,
        identity: Mapping[str, Any],
        make: Callable[[str], Silo],
        say: Callable[[str], None],
    ) -> None:
        """identity: as of a `Hub`. make: makes the silo of a session, at the first letter. say: tells how it goes."""
        self.table, self.identity, self._make, self._say = addresses, identity, make, say
        self.silo: Silo | None = None
        self.joiner = Joiner()
        self.session, self.welcomed, self.ended = secrets.token_hex(8), threading.Event(), threading.Event()
        self.error: str | None = None
        super().__init__(
            _arguments(addresses, table, number), object(), rank=number, size=len(addresses), backend="GRPC"
        )

    def _init_manager(self) -> None:
        _listen(self)

    def run(self) -> None:
        """Say hello until the server answers, and answer letters until it ends the run.

        Raises FedbenchError where the server refuses this silo, or the silo has lost what its clients keep.
        """
        self._say("waiting for the server")
        threading.Thread(target=self._say_hello, daemon=True).start()
        super().run()
        self.ended.set()
        if self.error is not None:
            raise FedbenchError(self.error)

    def _say_hello(self) -> None:
        hello = {"session": self.session, "identity": self.identity, "silos": len(self.table) - 1}
        while not self.ended.is_set():
            if not self.welcomed.is_set():
                message = Message(MyMessage.MSG_TYPE_C2S_CLIENT_STATUS, self.rank, 0)
                message.add_params(MyMessage.MSG_ARG_KEY_CLIENT_STATUS, self.ONLINE_STATUS_FLAG)
                message.add_params(LETTER, seal(hello))
                with suppress(grpc.RpcError):  # the server is not there yet
                    self.send_message(message)
            self.ended.wait(HELLO_SECONDS)

    def handle_message_connection_ready(self, message: Any) -> None:
        """FedML says hello here, once; `_say_hello` does until it is heard."""

    def handle_message_check_status(self, message: Any) -> None:
        self.welcomed.clear()  # a server that has not heard of this silo

    def handle_message_init(self, message: Any) -> None:
        try:
            about, _ = unseal(Joiner().add(message.get(LETTER)) or b"")
        except MessageError:
            return
        if about.get("session") == self.session:
            if about["refused"] is not None:
                self._stop(f"silo {self.rank} is refused: {about['refused']}")
            elif not self.welcomed.is_set():
                self._say("the server is there")
            self.welcomed.set()

    def handle_message_receive_model_from_server(self, message: Any) -> None:
        try:
            letter = self.joiner.add(message.get(LETTER))
            if letter is None:
                return
            self.silo = self.silo or self._make(self.session)
            before = self.silo.done
            answer = self.silo.answer(letter)
        except MessageError:
            return  # the server leaves this silo out when its time is up
        if answer is None:
            return
        self._send(answer)
        if self.silo.done != before:
            self._say(f"after round {self.silo.done + 1}")
        if self.silo.lost is not None:
            self._stop(self.silo.lost)

    def _send(self, letter: bytes, tries: int = 10) -> None:
        """Send an answer; a server that cannot be reached is tried again, and greeted anew in the end."""
        for _ in range(tries):
            try:
                for piece in cut(letter):
                    message = Message(MyMessage.MSG_TYPE_C2S_SEND_MODEL_TO_SERVER, self.rank, 0)
                    message.add_params(LETTER, piece)
                    self.send_message(message)
                return
            except grpc.RpcError:
                time.sleep(HELLO_SECONDS)
        self.welcomed.clear()

    def handle_message_finish(self, message: Any) -> None:
        if self.silo is not None:
            self.silo.memory.clear()
        self._say("the run is complete")
        self._stop(None)

    def _stop(self, error: str | None) -> None:
        self.error = error
        self.finish()
