//! A network of many links on one machine: two namespaces joined by pairs of virtual NICs, each shaped to a fixed rate.
//!
//! A host of an RL cluster has up to 32 NICs, a laptop has one. Here trainers live on side A, inference ranks on side B,
//! and link `i` is NIC `i` of both. A rank that leaves a link idle, or sends two links' bytes over one, is seen in its time,
//! because the links are the narrowest part. What is measured here is a share of the shaped rate, never a real network's speed.
//!
//! It shells out to `ip` and `tc` (iproute2) and needs root. It must never touch a namespace, a device or a process that
//! is not its own: everything stands inside its two namespaces, whose names begin with [`PREFIX`]. Nothing is left behind:
//! dropping a [`Lab`] takes it down, and what a killed process left is removed by the next [`Lab::up`] or [`down`].

#![forbid(unsafe_code)]

mod error;
mod occupants;
mod options;
mod owner;
mod removal;
mod script;
mod shell;

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

pub use error::LabError;
pub use options::{
    BURST_BYTES_RANGE, LINKS_MAX, LabOptions, MTU_RANGE, NAME_BYTES_MAX, RATE_BITS_RANGE, parse_rate,
};
pub use removal::{LabState, down, list};
pub use shell::check;

use crate::owner::{Owner, TAKE_MAX};

/// What the names of all namespaces of labs begin with.
pub const PREFIX: &str = "weightsync-";

/// How long NICs may take to come up: the kernel puts off such news for a second at most.
const UP_MAX: Duration = Duration::from_secs(10);

/// How often they are looked at.
const UP_POLL: Duration = Duration::from_millis(20);

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where trainers live.
    A,
    /// Where inference ranks live.
    B,
}

impl Side {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The last byte of its addresses.
    fn host(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::A => "-a",
            Self::B => "-b",
        }
    }
}

/// The network namespace of one side of the lab of this name, as `ip netns` knows it.
pub fn namespace(name: &str, side: Side) -> String {
    format!("{PREFIX}{name}{}", side.suffix())
}

/// A lab that stands. Dropping it takes it down and kills what still runs in it, or is about to.
#[derive(Debug)]
pub struct Lab {
    name: String,
    options: LabOptions,
    /// `None` once it has been given up.
    owner: Option<Owner>,
}

impl Lab {
    /// Builds a lab: both namespaces, the links with their rates and addresses, and an unshaped control link. Removes what
    /// killed processes left of others first.
    ///
    /// # Errors
    ///
    /// Without root or iproute2, for options out of range, when a living process has a lab of this name or one was left
    /// standing with [`Lab::keep`], and when `ip` or `tc` fails; then nothing is left.
    pub fn up(name: &str, options: &LabOptions) -> Result<Self, LabError> {
        options::check_name(name)?;
        options.check()?;
        shell::check_programs()?;
        let owner = Owner::take(name, TAKE_MAX)?;
        if owner.is_kept()? && removal::stands(name) {
            return Err(LabError::Standing { name: name.to_owned() });
        }
        owner.sign()?;
        removal::sweep();
        removal::take_apart(name)?;
        // From here on an error drops the lab, which takes down what there is of it.
        let lab = Self { name: name.to_owned(), options: options.clone(), owner: Some(owner) };
        lab.build()?;
        Ok(lab)
    }

    fn build(&self) -> Result<(), LabError> {
        let [a, b] = Side::ALL.map(|side| namespace(&self.name, side));
        shell::batch("ip", None, &[format!("netns add {a}"), format!("netns add {b}")])?;
        // Before there is a device: new ones take over the defaults.
        for side in [&a, &b] {
            shell::run("ip", &["netns", "exec", side, "sh", "-c", script::SETTINGS])?;
        }
        shell::batch("ip", Some(&a), &script::links(&self.options, &b))?;
        shell::batch("ip", Some(&a), &script::addresses(&self.options, Side::A))?;
        shell::batch("ip", Some(&b), &script::addresses(&self.options, Side::B))?;
        let shaping = script::shaping(&self.options);
        shell::batch("tc", Some(&a), &shaping)?;
        shell::batch("tc", Some(&b), &shaping)?;
        // libfabric does not offer a NIC that is not up yet.
        Side::ALL.iter().try_for_each(|side| self.wait_until_up(*side))
    }

    fn wait_until_up(&self, side: Side) -> Result<(), LabError> {
        let (until, namespace) = (Instant::now() + UP_MAX, namespace(&self.name, side));
        loop {
            let shown = shell::run("ip", &["-n", &namespace, "-o", "link", "show", "group", script::GROUP])?;
            let down = shown.lines().find(|line| !line.contains(" state UP "));
            let Some(line) = down else { return Ok(()) };
            if Instant::now() >= until {
                return Err(LabError::NotUp { namespace, waited: UP_MAX, line: line.to_owned() });
            }
            std::thread::sleep(UP_POLL);
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it was built.
    pub fn options(&self) -> &LabOptions {
        &self.options
    }

    /// A command that runs `program` on this side.
    pub fn command(&self, side: Side, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace(&self.name, side)]).arg(program);
        command
    }

    /// The words that put before a command run it on this side.
    pub fn prefix(&self, side: Side) -> Vec<String> {
        ["ip", "netns", "exec", &namespace(&self.name, side)].map(str::to_owned).into()
    }

    /// The name of a link's NIC, the same on both sides.
    pub fn device(link: u16) -> String {
        format!("rail{link}")
    }

    /// The address of a link's NIC. Each link is a subnet of its own, so what goes to the peer's NIC `j` goes over link
    /// `j`, whatever address it comes from.
    pub fn address(side: Side, link: u16) -> Ipv4Addr {
        let [high, low] = link.to_be_bytes();
        Ipv4Addr::new(10, high, low, side.host())
    }

    /// The address of the unshaped control link.
    pub fn control_address(side: Side) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 255, side.host())
    }

    /// Sets a link's NIC on one side up or down, as an operator or a broken cable would. Its address and rate stay.
    ///
    /// # Errors
    ///
    /// For a link that the lab does not have, and when `ip` fails.
    pub fn set_link(&self, side: Side, link: u16, up: bool) -> Result<(), LabError> {
        self.check_link(link)?;
        self.set_device(side, &Self::device(link), up)
    }

    /// Sets the control link's NIC on one side up or down. Its address stays.
    ///
    /// # Errors
    ///
    /// When `ip` fails.
    pub fn set_control(&self, side: Side, up: bool) -> Result<(), LabError> {
        self.set_device(side, script::CONTROL, up)
    }

    fn set_device(&self, side: Side, device: &str, up: bool) -> Result<(), LabError> {
        let state = if up { "up" } else { "down" };
        let namespace = namespace(&self.name, side);
        shell::run("ip", &["-n", &namespace, "link", "set", device, state]).map(drop)
    }

    /// Removes a link's NICs on both sides, as if they were pulled out. They do not come back.
    ///
    /// # Errors
    ///
    /// For a link that the lab does not have (any more), and when `ip` fails.
    pub fn delete_link(&self, link: u16) -> Result<(), LabError> {
        self.check_link(link)?;
        let namespace = namespace(&self.name, Side::A);
        shell::run("ip", &["-n", &namespace, "link", "del", &Self::device(link)]).map(drop)
    }

    /// Gives a link another rate, in bits per second, on both sides. What is on its way stays.
    ///
    /// # Errors
    ///
    /// For a link that the lab does not have, a rate out of range, and when `tc` fails.
    pub fn reshape(&self, link: u16, rate_bits: u64) -> Result<(), LabError> {
        self.check_link(link)?;
        options::check_rate(rate_bits)?;
        let line = script::shape("change", &self.options, link, rate_bits);
        for side in Side::ALL {
            shell::batch("tc", Some(&namespace(&self.name, side)), std::slice::from_ref(&line))?;
        }
        Ok(())
    }

    /// The largest share of a shaped rate that can be TCP payload, at this MTU in bytes. `tbf` counts Ethernet frames: 14
    /// bytes of header and the MTU, of which IPv4 takes 20, TCP 20 and its timestamps 12. At 1500 that is 1448 of 1514.
    pub fn payload_share(mtu: u32) -> f64 {
        const ETHERNET: f64 = 14.0;
        const IP_AND_TCP: f64 = 20.0 + 20.0 + 12.0;
        let mtu = f64::from(mtu);
        (mtu - IP_AND_TCP).max(0.0) / (mtu + ETHERNET)
    }

    /// Leaves it standing when this process ends; only [`down`] removes it then.
    ///
    /// # Errors
    ///
    /// When that cannot be noted down; then it is taken down.
    pub fn keep(mut self) -> Result<(), LabError> {
        if let Some(owner) = &self.owner {
            owner.note_kept()?;
        }
        self.owner = None;
        Ok(())
    }

    fn check_link(&self, link: u16) -> Result<(), LabError> {
        let links = self.options.links;
        if link < links { Ok(()) } else { Err(LabError::Link { link, links }) }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let Some(owner) = self.owner.take() else { return };
        if let Err(error) = removal::remove(&self.name, owner) {
            // Nobody is left who could be told otherwise.
            eprintln!("the lab {} is not all down: {error}", self.name);
        }
    }
}
