"""Only public addresses are dialled, whatever they are wrapped in."""

import pytest

from sgl_diffusion.server.addresses import is_public


@pytest.mark.parametrize(
    "text",
    ["93.184.216.34", "1.1.1.1", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8",
     "2002:0808:0808::1"],
)  # fmt: skip
def test_public(text):
    assert is_public(text)


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1",
     "169.254.169.254", "168.63.129.16", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
     "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
     "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:168.63.129.16",
     "::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8",
     "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe",
     "2001:0:7f00:1::", "", "localhost", "1.1.1", "0x7f.1"],
)  # fmt: skip
def test_not_public(text):
    assert not is_public(text)
