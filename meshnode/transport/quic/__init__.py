"""libp2p's QUIC v1 transport on aioquic's sans-IO engine, under Trio.

Decides: how bytes travel between two authenticated peers over one UDP socket.  Does not know:
which protocols run on the streams, models, requests.  Import what you need from the modules;
only `libp2p.py` imports py-libp2p, so everything else loads fast.

In data-flow order, from the wire upwards:

    endpoint.py    one UDP socket: batches in, segmented sends out, timers, who may connect
    connection.py  one connection as a value: datagrams and times in, datagrams and bytes out
    tls.py         the libp2p certificate: which peer id a handshake proves
    congestion.py  how much may be in flight, and in what bursts
    session.py     what tasks await: open, accept, read, write, the end of a connection
    libp2p.py      the same behind py-libp2p's ITransport, IListener, IMuxedConn, IMuxedStream
    config.py, errors.py   every number with its reason; every failure by whose doing it was

What holds on every stream: bytes arrive in order or the stream fails; all bytes written before
`finish` are read before the end is; a reset is never mistaken for an end; a slow reader
blocks its writer, and only that one; a dead peer fails every read and write within 3 s.

aioquic 1.7 has traps.  Each is covered in `connection.py`; each test named here fails when
its cover is taken away (tests/transport/test_quic_core.py unless said otherwise):

 1. A server asks clients for no certificate, unless a private attribute of its TLS context is
    set.  test_a_client_without_certificate_is_refused
 2. A stream id that is handed out but not used counts as finished once a later id writes.
    So streams are created inside the engine at once.  test_stream_ids_are_reserved_at_open
 3. A stream opened beyond the peer's limit is queued inside the engine for ever.  So
    `open_stream` waits for the limit to rise.  test_opening_beyond_the_limit_waits_for_a_free_one
    (test_quic_streams.py)
 4. Windows double when half of them was *received*, whether or not anybody reads.  So they
    follow consumed bytes.  test_windows_follow_what_is_consumed_not_what_is_received
 5. The end of a connection is reported after 3 PTOs of draining.  So the closing state is
    looked at directly.  test_a_clean_close_is_noticed_at_once
 6. A close during the handshake loses its reason unless it names a frame type (RFC 9000
    section 10.2.3).  test_the_wrong_peer_is_refused_and_told
 7. There is no path MTU discovery, and the frame length is written in 14 bits, so no datagram
    may exceed 16,383 bytes.  test_the_largest_datagram_that_passes_is_found,
    test_a_path_that_shrinks_falls_back_to_small_datagrams
 8. The pacer releases one packet per timer and charges a full datagram for every
    acknowledgement; HyStart takes scheduling delays for congestion.  Both are replaced
    (congestion.py); tests/bench/quic.py measures it.
 9. Keys are never renewed on their own.  test_keys_are_renewed_before_they_wear_out
10. Asked for its timer or datagrams before its first packet, a server raises TypeError or
    IndexError; and any bug that hostile bytes reach would raise through us.
    test_a_server_without_a_packet_has_nothing_to_do,
    test_an_engine_failure_ends_the_connection_only
11. Every lone packet is acknowledged in a datagram of its own 1 ms later, even if data leaves
    in between.  So acknowledgements wait for company and travel with data.
    test_a_lone_packet_is_acknowledged_late_but_before_it_seems_lost,
    test_an_acknowledgement_travels_with_an_answer
12. Round trips are at least 1 ms, and a peer's wait is subtracted wholly or not at all, so that
    on a shorter path its wait counts as path.  So we limit what is subtracted, not whether.
    test_the_round_trip_is_the_paths_and_not_the_wait_for_company
13. To find out that there is nothing to send costs as much as a packet, and most datagrams call
    for no answer.  So it is not asked then.  test_a_quiet_engine_has_nothing_to_send

A token's way is kept short: readers run before their connection answers (endpoint.py), a lone
write leaves at once, and what others write in the same scheduler pass leaves together after it
(session.py).

The engine is behind one seam: replacing aioquic means rewriting `_Engine` and the few private
names `connection.py` reads, nothing else.
"""
