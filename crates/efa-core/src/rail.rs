//! One endpoint with its completion queue, peers, registrations and operations in flight.
//!
//! A rail has a domain of its own, so nothing it does needs a lock, and it is used by one thread at a time. It must never
//! free what the provider may still touch: it closes the endpoint first, and where that fails it leaks everything.

use std::collections::HashMap;
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use libfabric_sys as sys;

use crate::address::{ADDRESS_BYTES_MAX, RailAddress};
use crate::completion::{OpKind, Unfinished};
use crate::error::{CallError, CloseFailed, RailError};
use crate::in_flight::InFlight;
use crate::info::{Info, Provider};
use crate::object::{Object, check, errno};
use crate::peer::{PEERS_MAX, Peer, PeerId, address_text, padded_own};
use crate::queue::{Entries, open_queue};
use crate::region::{RegionId, Regions};
use crate::table::Table;
use crate::wait::{Armed, Waker, wait_any};

/// Room for this many immediates takes a completion queue of some 40 MiB; more is a mistake.
const IMMEDIATES_MAX: u64 = 1 << 20;

/// A rail's depths, and how it waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RailConfig {
    /// Writes, reads and sends that may be in flight together.
    pub writes_max: u32,
    /// Receives that may be posted together.
    pub receives_max: u32,
    /// Immediates that peers may have sent and [`Rail::poll`] has not yet read. The completion queue has room for them
    /// on top of the rail's own operations. A provider that counts on this room breaks down when peers exceed it, so
    /// the sum of what all peers may have in flight to this rail must stay below.
    pub immediates_max: u32,
    /// Open the completion queue with a descriptor to block on. Without one, and with providers that have none,
    /// [`Rail::wait`] naps and returns.
    pub blocking_wait: bool,
}

impl Default for RailConfig {
    fn default() -> Self {
        Self { writes_max: 128, receives_max: 16, immediates_max: 1024, blocking_wait: true }
    }
}

impl RailConfig {
    /// The defaults, cut down to what the info allows.
    pub fn for_info(info: &Info) -> Self {
        let default = Self::default();
        let cut = |depth: usize, max: u32| u32::try_from(depth).unwrap_or(u32::MAX).clamp(1, max);
        Self {
            writes_max: cut(info.facts().transmit_depth, default.writes_max),
            receives_max: cut(info.facts().receive_depth, default.receives_max),
            ..default
        }
    }
}

/// One NIC's, or interface's, way to its peers. See the crate's documentation.
///
/// Dropping closes it: the endpoint first, then everything else; it never waits for the network. If the endpoint does
/// not close, all that the rail holds is leaked, and an error is logged.
pub struct Rail {
    pub(crate) live: ManuallyDrop<Live>,
}

/// What an open rail consists of. **Field order is teardown order**: once the endpoint has closed, nothing touches
/// the buffers in flight; then the queue and the vector that it was bound to; then the registrations, which must
/// outlive every operation that names them; then the domain and the fabric that all of them belong to.
pub(crate) struct Live {
    pub(crate) endpoint: Object<sys::fid_ep>,
    pub(crate) in_flight: InFlight,
    pub(crate) cq: Object<sys::fid_cq>,
    pub(crate) av: Object<sys::fid_av>,
    pub(crate) regions: Regions,
    pub(crate) domain: Object<sys::fid_domain>,
    fabric: Object<sys::fid_fabric>,
    // From here on plain values.
    pub(crate) peers: Table<Peer>,
    pub(crate) peers_by_address: HashMap<RailAddress, PeerId>,
    pub(crate) library: sys::Library,
    pub(crate) info: Info,
    pub(crate) name: String,
    pub(crate) address: RailAddress,
    pub(crate) address_format: u32,
    pub(crate) message_bytes_max: usize,
    /// Whether closing a registration stops accesses under way: only where a NIC, not the provider, moves the bytes.
    pub(crate) nic_enforces_access: bool,
    pub(crate) broken: bool,
    pub(crate) entries: Entries,
    queue_descriptor: Option<RawFd>,
    waker: Waker,
}

impl Rail {
    /// Opens a rail of its own fabric and domain.
    ///
    /// # Errors
    ///
    /// [`RailError::Config`] when the configuration asks for more than the info offers; [`RailError::Call`] when the
    /// provider refuses.
    pub fn open(info: &Info, config: &RailConfig) -> Result<Self, RailError> {
        let facts = info.facts();
        let on = format!("{} on {}", facts.provider, facts.domain);
        for (what, asked, allowed) in [
            ("writes_max", config.writes_max, facts.transmit_depth as u64),
            ("receives_max", config.receives_max, facts.receive_depth as u64),
            ("immediates_max", config.immediates_max, IMMEDIATES_MAX),
        ] {
            let asked = u64::from(asked);
            if asked == 0 || asked > allowed {
                return Err(RailError::Config { what, asked, allowed, on });
            }
        }
        if facts.immediate_bytes < size_of::<u32>() {
            let why = format!("its immediates have {} bytes, 4 are needed", facts.immediate_bytes);
            return Err(RailError::Unsuitable { on, why });
        }
        let library = info.library().sys().clone();
        let Some(raw) = info.to_raw() else {
            return Err(RailError::Unsuitable { on, why: "no memory for a copy of its info".to_owned() });
        };
        // SAFETY: our own copy of a complete info; nothing else has it.
        let parts = unsafe { &*raw.as_ptr() };
        let (fabric_attr, address_format) = (parts.fabric_attr, parts.addr_format);

        let fabric = Object::open(&library, "fi_fabric", &on, |fabric| {
            // SAFETY: the attributes of an info of this library.
            unsafe { library.fi_fabric(fabric_attr, fabric) }
        })?;
        let domain = Object::open(&library, "fi_domain", &on, |domain| {
            // SAFETY: the fabric is open, and the info is its own.
            unsafe { sys::fi_domain(fabric.as_ptr(), raw.as_ptr(), domain) }
        })?;
        let (cq, queue_descriptor) = open_queue(&library, &domain, config, &on)?;
        let mut av_attr = sys::fi_av_attr {
            type_: sys::FI_AV_UNSPEC,
            rx_ctx_bits: 0,
            count: 0,
            ep_per_node: 0,
            name: std::ptr::null(),
            map_addr: std::ptr::null_mut(),
            flags: 0,
        };
        let av = Object::open(&library, "fi_av_open", &on, |av| {
            // SAFETY: the domain is open.
            unsafe { sys::fi_av_open(domain.as_ptr(), &raw mut av_attr, av) }
        })?;
        let endpoint = Object::open(&library, "fi_endpoint", &on, |ep| {
            // SAFETY: the domain is open, and the info is its own.
            unsafe { sys::fi_endpoint(domain.as_ptr(), raw.as_ptr(), ep) }
        })?;
        if info.provider() == Provider::Efa {
            refuse_shortcuts(&library, &endpoint);
        }
        // SAFETY: both are open, of one domain, and the queue outlives the endpoint by field order.
        let code =
            unsafe { sys::fi_ep_bind(endpoint.as_ptr(), cq.as_fid(), sys::FI_TRANSMIT | sys::FI_RECV) };
        check(&library, "fi_ep_bind(cq)", &on, code)?;
        // SAFETY: as above.
        let code = unsafe { sys::fi_ep_bind(endpoint.as_ptr(), av.as_fid(), 0) };
        check(&library, "fi_ep_bind(av)", &on, code)?;
        // SAFETY: bound to all it needs.
        let code = unsafe { sys::fi_enable(endpoint.as_ptr()) };
        check(&library, "fi_enable", &on, code)?;

        let nic_enforces_access = info.provider() == Provider::Efa
            && emulated(&endpoint, sys::FI_OPT_EFA_EMULATED_WRITE) == Some(false)
            && emulated(&endpoint, sys::FI_OPT_EFA_EMULATED_READ) == Some(false);
        let address = own_address(&library, &endpoint, &on)?;
        let words = address_text(&av, &padded_own(&address));
        let name = format!("{}://{words} ({})", facts.provider, facts.domain);
        let waker = Waker::new().map_err(|errno| RailError::System { on, what: "eventfd", source: errno })?;
        let live = Live {
            endpoint,
            in_flight: InFlight::new(config.writes_max, config.receives_max),
            cq,
            av,
            regions: Regions::new(),
            domain,
            fabric,
            peers: Table::new(PEERS_MAX),
            peers_by_address: HashMap::new(),
            library,
            info: info.clone(),
            name,
            address,
            address_format,
            message_bytes_max: facts.message_bytes_max,
            nic_enforces_access,
            broken: false,
            entries: Entries::new(),
            queue_descriptor,
            waker,
        };
        Ok(Self { live: ManuallyDrop::new(live) })
    }

    /// What peers insert to reach this rail.
    pub fn address(&self) -> &RailAddress {
        &self.live.address
    }

    /// The rail in words, for messages: `tcp://127.0.0.1:40123 (lo)`.
    pub fn name(&self) -> &str {
        &self.live.name
    }

    /// What the rail was opened on.
    pub fn info(&self) -> &Info {
        &self.live.info
    }

    /// Whether the NIC itself moves the bytes of one-sided operations. `false` for software providers, and for EFA
    /// where the device or the library lacks RDMA read or write.
    pub fn is_offloaded(&self) -> bool {
        self.live.nic_enforces_access || self.live.info.provider() == Provider::Verbs
    }

    /// How many operations are in flight, receives included.
    pub fn in_flight(&self) -> usize {
        self.live.in_flight.len()
    }

    /// How many more writes, reads and sends the in-flight table has room for.
    pub fn room(&self) -> u32 {
        self.live.in_flight.room(OpKind::Write)
    }

    /// Ends waits of this rail from other threads.
    pub fn waker(&self) -> Waker {
        self.live.waker.clone()
    }

    /// Blocks until the completion queue may have something, somebody calls the [`Waker`], or the time is up; `false` when
    /// it is known that nothing has happened. May return early: poll, then wait again.
    ///
    /// Waking up costs more than polling. While peers write, poll for some hundred microseconds after each wait that
    /// answers `true`: over loopback TCP on two free cores, a receiver of 1 MiB writes that waited after every poll took
    /// 3.7 GB/s, one that polled for 300 microseconds first 5.4, and one that never waited 5.6.
    ///
    /// # Errors
    ///
    /// When the system or the provider refuses to wait.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, RailError> {
        let waker = self.waker();
        let armed = self.arm()?;
        wait_any([armed], Some(&waker), timeout).map_err(|source| RailError::System {
            on: self.live.name.clone(),
            what: "poll",
            source,
        })
    }

    /// What to wait for until the completion queue may have something, for [`wait_any`] over several rails.
    ///
    /// # Errors
    ///
    /// When the provider refuses to be waited for.
    pub fn arm(&mut self) -> Result<Armed<'_>, RailError> {
        let live = &mut *self.live;
        let Some(descriptor) = live.queue_descriptor else { return Ok(Armed::Blind) };
        let mut fid = live.cq.as_fid();
        // SAFETY: fabric and queue are open; the provider reads one entry.
        let code = unsafe { sys::fi_trywait(live.fabric.as_ptr(), &raw mut fid, 1) };
        if code == -sys::FI_EAGAIN {
            // Something is there, or the provider must make progress first.
            return Ok(Armed::Ready);
        }
        check(&live.library, "fi_trywait", &live.name, code)?;
        // SAFETY: the descriptor belongs to the queue, which is open as long as `self` is borrowed.
        Ok(Armed::On(unsafe { BorrowedFd::borrow_raw(descriptor) }))
    }

    /// Closes the rail and gives back all operations that were in flight.
    ///
    /// # Errors
    ///
    /// [`CloseFailed`] when the endpoint does not close: everything that the rail holds is leaked.
    pub fn close(self) -> Result<Vec<Unfinished>, CloseFailed> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so this is the only taking.
        let live = unsafe { ManuallyDrop::take(&mut this.live) };
        live.tear_down()
    }
}

impl Drop for Rail {
    fn drop(&mut self) {
        // SAFETY: `self` is going away, and `close` takes only from a rail that it keeps from being dropped.
        let live = unsafe { ManuallyDrop::take(&mut self.live) };
        if let Err(failed) = live.tear_down() {
            tracing::error!(%failed, "a rail did not close");
        }
    }
}

impl fmt::Debug for Rail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rail")
            .field("name", &self.live.name)
            .field("in_flight", &self.in_flight())
            .field("broken", &self.live.broken)
            .finish_non_exhaustive()
    }
}

impl Live {
    /// Closes the endpoint, then everything else in field order; or leaks everything.
    fn tear_down(self) -> Result<Vec<Unfinished>, CloseFailed> {
        let Self { endpoint, mut in_flight, cq, av, regions, domain, fabric, library: _, name, .. } = self;
        match endpoint.close() {
            Ok(()) => {
                // fi_endpoint(3): buffers may be released once fi_close on the endpoint has returned.
                let held = in_flight.drain();
                drop(in_flight);
                drop(cq);
                drop(av);
                drop(regions);
                drop(domain);
                drop(fabric);
                Ok(held)
            }
            Err((endpoint, errno)) => {
                let failed = CloseFailed {
                    call: CallError { call: "fi_close(ep)", on: name, errno },
                    operations: in_flight.len(),
                    regions: regions.table.len(),
                };
                std::mem::forget((endpoint, in_flight, cq, av, regions, domain, fabric));
                Err(failed)
            }
        }
    }

    /// Counts operations in flight on their peer and region, which cannot go away meanwhile.
    pub(crate) fn count(&mut self, peer: Option<PeerId>, region: RegionId, change: i32) {
        if let Some(registration) = self.regions.table.get_mut(region.0) {
            registration.in_flight = registration.in_flight.saturating_add_signed(change);
        }
        if let Some(entry) = peer.and_then(|peer| self.peers.get_mut(peer.0)) {
            entry.in_flight = entry.in_flight.saturating_add_signed(change);
        }
    }
}

/// Keeps EFA from carrying transfers over shared memory, which cannot be trusted with a dead peer, and from calling CUDA
/// from the rail's thread, which can deadlock behind a resident kernel.
fn refuse_shortcuts(library: &sys::Library, endpoint: &Object<sys::fid_ep>) {
    for (option, what) in [
        (sys::FI_OPT_SHARED_MEMORY_PERMITTED, "shared memory"),
        (sys::FI_OPT_CUDA_API_PERMITTED, "calls of the CUDA API"),
    ] {
        let permitted = false;
        // SAFETY: the endpoint is open and not yet enabled; both options take a C bool.
        let code = unsafe {
            sys::fi_setopt(
                endpoint.as_ptr(),
                sys::FI_OPT_ENDPOINT,
                option,
                (&raw const permitted).cast(),
                size_of::<bool>(),
            )
        };
        if code != 0 {
            let errno = errno(library, code);
            tracing::warn!(%errno, what, "this libfabric's efa does not let it be switched off");
        }
    }
}

/// Whether EFA emulates one-sided operations in software; `None` when it does not say.
fn emulated(endpoint: &Object<sys::fid_ep>, option: i32) -> Option<bool> {
    let mut value = 0_u8;
    let mut value_bytes = size_of::<bool>();
    // SAFETY: the endpoint is open, and the option is a C bool, for which `value` has room.
    let code = unsafe {
        sys::fi_getopt(
            endpoint.as_ptr(),
            sys::FI_OPT_ENDPOINT,
            option,
            (&raw mut value).cast(),
            &raw mut value_bytes,
        )
    };
    (code == 0).then_some(value != 0)
}

fn own_address(
    library: &sys::Library,
    endpoint: &Object<sys::fid_ep>,
    on: &str,
) -> Result<RailAddress, RailError> {
    let mut bytes = vec![0_u8; ADDRESS_BYTES_MAX];
    let mut len = bytes.len();
    // SAFETY: the endpoint is enabled, and the provider writes at most `len` bytes.
    let code = unsafe { sys::fi_getname(endpoint.as_ptr(), bytes.as_mut_ptr().cast(), &raw mut len) };
    check(library, "fi_getname", on, code)?;
    bytes.truncate(len);
    RailAddress::try_from(bytes)
        .map_err(|error| RailError::Unsuitable { on: on.to_owned(), why: error.to_string() })
}

#[cfg(test)]
mod tests;
