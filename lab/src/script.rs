//! What `ip` and `tc` are told, line by line. Runs nothing.

use crate::options::LabOptions;
use crate::{Lab, Side};

/// The NIC of the control link.
pub(crate) const CONTROL: &str = "control";

/// The group of all NICs of a lab, by which they are removed at once. Any number but the default group's 0 will do.
pub(crate) const GROUP: &str = "7";

/// How a packet may wait in a full link before it is dropped.
const LATENCY: &str = "50ms";

/// A shell script for the inside of a namespace that has no NIC yet.
///
/// A rank may be bound to its NIC `i` and write to the peer's NIC `j`: packets then come in by a NIC that does not lead
/// back to their sender (rp_filter off), yet each NIC answers for its own address alone (arp_ignore) and asks in its own
/// name (arp_announce). Without IPv6 a NIC has the one address that it was given. A kernel without IPv6 has no such file.
pub(crate) const SETTINGS: &str = "set -e; cd /proc/sys/net; \
    for of in all default lo; do \
        echo 0 > ipv4/conf/$of/rp_filter; \
        echo 1 > ipv4/conf/$of/arp_ignore; \
        echo 2 > ipv4/conf/$of/arp_announce; \
        if [ -e ipv6 ]; then echo 1 > ipv6/conf/$of/disable_ipv6; fi; \
    done";

/// All pairs of NICs, made inside side A with their other ends in `peer`, so that the machine's own namespace never has
/// them. Both ends of a pair get different indices: one whose other end has its own index is an ordinary NIC
/// to the kernel, which may tell up to a second late that it is up.
pub(crate) fn links(options: &LabOptions, peer: &str) -> Vec<String> {
    let rails = (0..options.links).map(|link| (Lab::device(link), options.mtu));
    // Control messages are small: the MTU of every network will do.
    let pairs = rails.chain([(CONTROL.to_owned(), 1500)]);
    // Loopback has index 1.
    let indices = (2_u32..).step_by(2);
    let line = |((device, mtu), index): ((String, u32), u32)| {
        let end = |index| format!("{device} index {index} mtu {mtu} group {GROUP}");
        format!("link add {} type veth peer name {} netns {peer}", end(index), end(index + 1))
    };
    pairs.zip(indices).map(line).collect()
}

/// The addresses of one side; everything comes up.
pub(crate) fn addresses(options: &LabOptions, side: Side) -> Vec<String> {
    let rails = (0..options.links).map(|link| (Lab::device(link), Lab::address(side, link)));
    let mut lines = vec!["link set lo up".to_owned()];
    for (device, address) in rails.chain([(CONTROL.to_owned(), Lab::control_address(side))]) {
        lines.push(format!("addr add {address}/24 dev {device}"));
        lines.push(format!("link set {device} up"));
    }
    lines
}

/// The rates of one side's NICs.
pub(crate) fn shaping(options: &LabOptions) -> Vec<String> {
    (0..options.links).map(|link| shape("add", options, link, options.rate_of(link))).collect()
}

/// The rate of one NIC; `verb` is add or change.
pub(crate) fn shape(verb: &str, options: &LabOptions, link: u16, rate_bits: u64) -> String {
    let (device, burst) = (Lab::device(link), options.burst_bytes);
    format!("qdisc {verb} dev {device} root tbf rate {rate_bits}bit burst {burst} latency {LATENCY}")
}
