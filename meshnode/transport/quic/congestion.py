"""Congestion control and pacing that survive a busy Python process.

Decides: how many bytes may be in flight and in what bursts.
Does not know: packets' contents, sockets, aioquic (it calls these classes by duck typing).

New Reno as in RFC 9002 section 7 with three published differences, all because the
sender and receiver are Python processes that share their CPUs with inference:

* no HyStart: its RTT samples measure scheduling delays here and end slow start far too
  early (HyStart++ is optional, RFC 9406);
* the multiplicative decrease is CUBIC's 0.7 with the matching additive increase 0.53, the
  pair RFC 9438 section 4.3 shows to be fair to Reno;
* the window does not grow while the application leaves it half empty (RFC 9002 section 7.8).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

INITIAL_WINDOW_PACKETS = 10  # RFC 9002 section 7.2
INITIAL_WINDOW_BYTES_MAX = 14_720  # RFC 9002 section 7.2
MINIMUM_WINDOW_PACKETS = 2  # RFC 9002 section 7.2
DECREASE = 0.7  # RFC 9438 section 4.6
INCREASE = 3 * (1 - DECREASE) / (1 + DECREASE)  # RFC 9438 section 4.3

PACING_GAIN = 1.25  # RFC 9002 section 7.7
# Trio's timers are good to about a millisecond: send what the rate allows per millisecond
# at once rather than wake for every packet.
PACING_QUANTUM_S = 0.001
RTT_S_MIN = 0.000_001


class SentPacket(Protocol):
    """The two facts this module reads of aioquic's packet record."""

    sent_bytes: int
    sent_time: float


class RenoWindow:
    """The congestion window of one connection, in bytes."""

    def __init__(self, *, max_datagram_size: int) -> None:
        self.datagram_bytes = max_datagram_size
        self.bytes_in_flight = 0
        self.congestion_window = _initial_window(max_datagram_size)
        self.ssthresh: int | None = None
        self._recovery_started_at = 0.0
        self._acked_towards_increase = 0.0

    def use_datagram_bytes(self, datagram_bytes: int) -> None:
        """Path probing changed the datagram size; a fresh window starts at the new one."""
        self.datagram_bytes = datagram_bytes
        self.congestion_window = max(self.congestion_window, _initial_window(datagram_bytes))

    def on_packet_sent(self, *, packet: SentPacket) -> None:
        self.bytes_in_flight += packet.sent_bytes

    def on_packet_acked(self, *, now: float, packet: SentPacket) -> None:
        half_empty = 2 * self.bytes_in_flight < self.congestion_window
        self.bytes_in_flight -= packet.sent_bytes
        if half_empty or packet.sent_time <= self._recovery_started_at:
            return
        if self.ssthresh is None or self.congestion_window < self.ssthresh:
            self.congestion_window += packet.sent_bytes
            return
        self._acked_towards_increase += INCREASE * packet.sent_bytes
        if self._acked_towards_increase >= self.congestion_window:
            self._acked_towards_increase -= self.congestion_window
            self.congestion_window += self.datagram_bytes

    def on_packets_expired(self, *, packets: Iterable[SentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[SentPacket]) -> None:
        last_sent_at = 0.0
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            last_sent_at = packet.sent_time
        if last_sent_at > self._recovery_started_at:
            self._recovery_started_at = now
            self.congestion_window = max(
                int(self.congestion_window * DECREASE), self._minimum_window()
            )
            self.ssthresh = self.congestion_window

    def on_persistent_congestion(self) -> None:
        self.congestion_window = self._minimum_window()
        self._recovery_started_at = 0.0

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """No HyStart: see the module docstring."""

    def get_log_data(self) -> dict[str, Any]:
        return {"cwnd": self.congestion_window, "bytes_in_flight": self.bytes_in_flight}

    def _minimum_window(self) -> int:
        return MINIMUM_WINDOW_PACKETS * self.datagram_bytes


class BurstPacer:
    """A token bucket that fills at the pacing rate and is emptied in bursts."""

    def __init__(self, datagram_bytes: int) -> None:
        self.datagram_bytes = datagram_bytes
        self._rate: float | None = None  # bytes per second
        self._tokens = 0.0
        self._tokens_max = 0.0
        self._filled_at = 0.0
        self._charged = 0

    def next_send_time(self, now: float) -> float | None:
        """When the next packet may leave, or None for "now"."""
        if self._rate is None:
            return None
        self._fill(now)
        if self._tokens > 0:
            return None
        return now + max(PACING_QUANTUM_S, self.datagram_bytes / self._rate)

    def update_after_send(self, now: float) -> None:
        """A packet was built; its size is not told, so charge a full one until `settle`."""
        self._tokens -= self.datagram_bytes
        self._charged += self.datagram_bytes

    def settle(self, sent_bytes: int) -> None:
        """The packets built since the last call had `sent_bytes` in all: refund the rest.

        Otherwise small messages and acknowledgements would wait as if they were large.
        """
        self._tokens += max(0, self._charged - sent_bytes)
        self._charged = 0

    def update_rate(self, *, congestion_window: int, smoothed_rtt: float) -> None:
        rate = PACING_GAIN * congestion_window / max(smoothed_rtt, RTT_S_MIN)
        burst_bytes = INITIAL_WINDOW_PACKETS * self.datagram_bytes  # RFC 9002 section 7.7
        self._tokens_max = max(burst_bytes, rate * PACING_QUANTUM_S)
        if self._rate is None:
            self._tokens = self._tokens_max
        self._rate = rate

    def _fill(self, now: float) -> None:
        assert self._rate is not None
        if now > self._filled_at:
            gained = (now - self._filled_at) * self._rate
            self._tokens = min(self._tokens + gained, self._tokens_max)
            self._filled_at = now


def _initial_window(datagram_bytes: int) -> int:
    return min(
        INITIAL_WINDOW_PACKETS * datagram_bytes,
        max(INITIAL_WINDOW_BYTES_MAX, 2 * datagram_bytes),
    )
