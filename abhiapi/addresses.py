"""Which addresses a customer's URL may lead to: public unicast ones, and loopback where a setting opens it.

Pure. What a customer names is connected to from inside the operator's network, so anything that is not plainly the
public internet is refused: private, link-local (which is where clouds keep their metadata), shared, multicast,
reserved, and IPv6 addresses that carry such an IPv4 address inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_V4_REFUSED = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # between carriers and their customers; some clouds' metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's own services behind a public-looking address
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
_V6_PUBLIC = ip_network("2000::/3")  # all there is of global unicast
_V6_REFUSED = tuple(ip_network(text) for text in ("2001::/23", "2001:db8::/32", "3fff::/20"))
_NAT64 = ip_network("64:ff9b::/96")


def is_allowed(text: str, *, with_loopback: bool = False) -> bool:
    """Whether an address may be connected to on a customer's behalf. What is no address is not."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return _is_public_v4(address) or (with_loopback and address.is_loopback)
    if address.scope_id is not None:
        return False
    carried = list(_carried(address))
    if carried:
        return all(_is_public_v4(one) for one in carried)
    if with_loopback and address.is_loopback:
        return True
    return address in _V6_PUBLIC and not any(address in net for net in _V6_REFUSED)


def is_loopback(text: str) -> bool:
    """Whether an address is this machine's own; what the simulator may call."""
    try:
        return ip_address(text).is_loopback
    except ValueError:
        return False


def _is_public_v4(address: IPv4Address) -> bool:
    return not any(address in net for net in _V4_REFUSED)


def _carried(address: IPv6Address) -> Iterator[IPv4Address]:
    """IPv4 addresses to which a packet for this one may be taken: mapped, 6to4, Teredo, NAT64."""
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _NAT64:
        yield IPv4Address(int(address) & 0xFFFFFFFF)
