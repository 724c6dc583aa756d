"""Who is a member and by what right: chains, meshes, invitations, join requests."""

from __future__ import annotations

import base64
import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.credentials import (
    CERTIFICATE_S,
    CLOCK_SKEW_S,
    TOKEN_CHARS_MAX,
    TOKEN_PREFIX,
    Admission,
    MeshDescriptor,
    check_join,
    create_invite,
    issue_certificate,
    parse_invite,
    verify_chain,
)
from meshnode.errors import ConfigError, NotAuthorizedError
from meshnode.identity import KeyPair
from meshnode.messages import JoinRequest, Role

NOW = 1_800_000_000


def key(name: str) -> KeyPair:
    return KeyPair.from_seed(name.encode().ljust(32, b"."))


ROOT, ISSUER, ADA, EVE = key("root"), key("issuer"), key("ada"), key("eve")
MESH = MeshDescriptor("lab", ROOT.public.hex(), "invite", ("/ip4/10.0.0.1/tcp/1",))
OPEN = MeshDescriptor("open", ROOT.public.hex(), "open")


def certificate(
    signer: KeyPair,
    subject: KeyPair,
    *roles: Role,
    mesh: MeshDescriptor = MESH,
    unix_s: int = NOW,
    lifetime_s: int = CERTIFICATE_S,
) -> bytes:
    return issue_certificate(signer, mesh, subject.peer_id, roles or ("node",), unix_s, lifetime_s)


DELEGATED = (certificate(ISSUER, ADA), certificate(ROOT, ISSUER, "issuer"))


# --- meshes --------------------------------------------------------------------------------------


def test_a_mesh_is_its_root_its_name_and_its_admission_and_not_its_addresses() -> None:
    replace = msgspec.structs.replace
    assert len(MESH.mesh_id) == 32
    assert replace(MESH, bootstrap=()).mesh_id == MESH.mesh_id
    others = (
        replace(MESH, name="lab2"),
        replace(MESH, root=EVE.public.hex()),
        replace(MESH, admission="open"),
    )
    assert len({MESH.mesh_id, *(other.mesh_id for other in others)}) == 4


def test_the_id_of_a_mesh_never_changes() -> None:
    """It prefixes every DHT key and topic: another formula would be another network."""
    mesh = MeshDescriptor("lab", "ab" * 32, "invite")
    assert mesh.mesh_id == "83d40c7f7cdf716fe0ee76e0ea26cf35"


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [(certificate(ROOT, ADA),), DELEGATED], ids=["root", "issuer"])
def test_a_chain_to_the_root_makes_a_member(chain: tuple[bytes, ...]) -> None:
    membership = verify_chain(MESH, ADA.peer_id, chain, NOW)
    assert membership.subject == ADA.peer_id
    assert membership.roles == ("node",)
    assert membership.not_after == NOW + CERTIFICATE_S


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((), "no membership certificate"),
        ((certificate(ROOT, ADA),) * 4, "no membership certificate"),
        ((b"",), "invalid"),
        ((certificate(ROOT, ADA)[:-1] + b"\0",), "invalid"),
        ((certificate(EVE, ADA),), "root key"),
        ((certificate(ADA, ADA),), "root key"),
        ((certificate(ROOT, EVE),), "of another peer"),
        ((certificate(ROOT, ADA, mesh=OPEN),), "of another mesh"),
        ((certificate(ISSUER, ADA),), "root key"),
        ((certificate(ISSUER, ADA), certificate(ROOT, ISSUER, "node")), "may not"),
        ((certificate(EVE, ADA), certificate(ROOT, ISSUER, "issuer")), "of another peer"),
        (tuple(reversed(DELEGATED)), "of another peer"),
        (
            (certificate(ISSUER, ADA), certificate(ROOT, ISSUER, "issuer", lifetime_s=-3600)),
            "expired",
        ),
    ],
)
def test_any_other_chain_does_not(chain: tuple[bytes, ...], reason: str) -> None:
    with pytest.raises(NotAuthorizedError, match=reason):
        verify_chain(MESH, ADA.peer_id, chain, NOW)


@pytest.mark.parametrize(
    ("offset_s", "valid"),
    [
        (-2 * CLOCK_SKEW_S - 1, False),
        (-2 * CLOCK_SKEW_S, True),
        (-600, True),
        (600, True),
        (CERTIFICATE_S + CLOCK_SKEW_S, True),
        (CERTIFICATE_S + CLOCK_SKEW_S + 1, False),
    ],
)
def test_a_certificate_has_a_time_with_room_for_wrong_clocks(offset_s: int, valid: bool) -> None:
    chain = (certificate(ROOT, ADA),)
    if valid:
        verify_chain(MESH, ADA.peer_id, chain, NOW + offset_s)
    else:
        with pytest.raises(NotAuthorizedError, match=r"clocks|expired"):
            verify_chain(MESH, ADA.peer_id, chain, NOW + offset_s)


def test_in_an_open_mesh_everybody_certifies_itself_and_nobody_else() -> None:
    verify_chain(OPEN, ADA.peer_id, (certificate(ADA, ADA, mesh=OPEN),), NOW)
    for chain in (
        (certificate(EVE, ADA, mesh=OPEN),),
        (certificate(ADA, ADA, "issuer", mesh=OPEN),),
        (certificate(EVE, ADA, mesh=OPEN), certificate(EVE, EVE, mesh=OPEN)),
        (certificate(ADA, ADA, mesh=OPEN), certificate(ADA, ADA, "issuer", mesh=OPEN)),
    ):
        with pytest.raises(NotAuthorizedError):
            verify_chain(OPEN, ADA.peer_id, chain, NOW)


# --- invitations ---------------------------------------------------------------------------------


def invite(**changes: object) -> str:
    fields: dict[str, object] = {
        "honoured_by": ISSUER.peer_id,
        "roles": ("node",),
        "uses_max": 3,
        "not_after": NOW + 3600,
    }
    signer, mesh = changes.pop("signer", ROOT), changes.pop("mesh", MESH)
    return create_invite(signer, mesh, **{**fields, **changes})  # type: ignore[arg-type]


def admit(request: JoinRequest, sender: KeyPair = ADA, unix_s: int = NOW) -> Admission:
    return check_join(MESH, ISSUER.peer_id, sender.peer_id, request, unix_s)


def test_a_token_says_which_mesh_and_admits_whoever_shows_it() -> None:
    parsed = parse_invite(invite())
    assert parsed.mesh == MESH
    admission = admit(parsed.request_for(ADA.peer_id))
    assert admission.subject == ADA.peer_id
    assert admission.roles == ("node",)
    assert admission.uses_max == 3


def test_all_uses_of_a_token_are_counted_as_one_invitation() -> None:
    parsed, other = parse_invite(invite()), parse_invite(invite())
    keys = [admit(parsed.request_for(who.peer_id), who).use_key for who in (ADA, EVE)]
    assert keys[0] == keys[1]
    assert admit(other.request_for(ADA.peer_id)).use_key != keys[0]


def test_a_token_is_a_secret_that_is_not_shown_by_accident() -> None:
    token = invite()
    parsed = parse_invite(token)
    secret = parsed._key.seed
    for text in (repr(parsed), str(parsed)):
        assert secret.hex() not in text
        assert repr(secret) not in text
        assert token not in text


def test_line_breaks_from_pasting_do_not_matter() -> None:
    token = invite()
    assert parse_invite(f"  {token[:40]}\n{token[40:80]} {token[80:]}\n") is not None


def test_another_peer_cannot_use_a_request_that_it_saw() -> None:
    request = parse_invite(invite()).request_for(ADA.peer_id)
    with pytest.raises(NotAuthorizedError, match="not proven"):
        admit(request, sender=EVE)


def test_the_invitation_without_its_key_is_worth_nothing() -> None:
    """The issuer-side half travels in clear to whoever runs the issuer."""
    real, own = parse_invite(invite()), parse_invite(invite())
    mixed = JoinRequest(
        real.request_for(EVE.peer_id).invitation, own.request_for(EVE.peer_id).proof
    )
    with pytest.raises(NotAuthorizedError, match="not proven"):
        admit(mixed, sender=EVE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"not_after": NOW - CLOCK_SKEW_S - 1}, "expired"),
        ({"signer": EVE}, "not made by this mesh"),
        ({"mesh": OPEN}, "another mesh"),
        ({"honoured_by": EVE.peer_id}, "another node"),
    ],
)
def test_a_token_that_must_not_work_is_refused_by_the_issuer(
    changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(NotAuthorizedError, match=reason):
        admit(parse_invite(invite(**changes)).request_for(ADA.peer_id))


@pytest.mark.parametrize("part", ["invitation", "proof"])
def test_a_join_request_of_noise_is_refused(part: str) -> None:
    request = parse_invite(invite()).request_for(ADA.peer_id)
    with pytest.raises(NotAuthorizedError, match="invalid"):
        admit(msgspec.structs.replace(request, **{part: b"noise"}))


@pytest.mark.parametrize(
    "text",
    ["", "mesh1.", "mesh1.!!!!", "mesh1.ü", "hello", "mesh2.abc", "mesh1." + "A" * TOKEN_CHARS_MAX],
)
def test_what_is_no_token_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ConfigError, match="paste the whole line"):
        parse_invite(text)


TOKEN = invite()


@given(st.integers(len(TOKEN_PREFIX), len(TOKEN) - 1), st.sampled_from(string.ascii_letters))
@settings(max_examples=300, deadline=None)
def test_a_tampered_token_is_refused_or_admits_to_the_same_mesh_only(
    place: int, letter: str
) -> None:
    """Bootstrap addresses are not signed: they only say where to knock."""
    tampered = TOKEN[:place] + letter + TOKEN[place + 1 :]
    try:
        parsed = parse_invite(tampered)
    except ConfigError:
        return
    assert parsed.mesh.mesh_id == MESH.mesh_id
    assert parsed.invitation == parse_invite(TOKEN).invitation


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_no_text_does_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_invite(TOKEN_PREFIX + base64.urlsafe_b64encode(data).decode())


def test_the_name_of_a_mesh_has_no_line_break_and_no_path() -> None:
    for name in ("lab\n", "a/b", "", "x" * 65, "a b"):
        content = {"name": name, "root": "ab" * 32, "admission": "open"}
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(content, MeshDescriptor)
