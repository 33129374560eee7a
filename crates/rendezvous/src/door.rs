//! Connections that have not proved themselves: how many there may be, and who has to go when there are more.
//!
//! Whoever connects is let in at once, and the connection that pays for it is the oldest of the address that has most of them.
//! So silent connections, however many, cost their own address places and nobody else; a handshake takes milliseconds, and
//! ends before its connection is the oldest. Members that are turned away come again. What is logged is bounded too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use crate::refusal::Refusal;

/// Connections that have not proved themselves. A full job of 65 536 ranks comes in waves; the rest wait in the backlog.
const UNPROVED_MAX: usize = 1024;

/// An address with no more of them than this is taken for a host of honest ranks, which has one for each GPU and a few more.
const HONEST_MAX: usize = 16;

/// What a connection of an honest address has at least, however many wait.
const GRACE: Duration = Duration::from_secs(1);

/// Lines about strangers in the log, for each second.
const LINES_MAX: u32 = 10;

/// See the module.
#[derive(Clone, Default)]
pub(crate) struct Door(Arc<Shared>);

#[derive(Default)]
struct Shared {
    inside: Mutex<Inside>,
    /// A place became free.
    freed: Notify,
}

#[derive(Default)]
struct Inside {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// The numbers of each source's, oldest first. No source is without any.
    by_source: HashMap<IpAddr, BTreeSet<u64>>,
    lines: Lines,
}

struct Waiting {
    source: IpAddr,
    since: Instant,
    /// Dropped to turn it away.
    _stay: oneshot::Sender<()>,
}

/// How much was logged.
#[derive(Default)]
struct Lines {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

/// A connection's place, until it is dropped.
pub(crate) struct Place {
    door: Door,
    number: u64,
    stay: oneshot::Receiver<()>,
}

impl Door {
    /// Waits until there is room for one more, and makes it where somebody has too many.
    pub(crate) async fn room(&self) {
        loop {
            let freed = self.0.freed.notified();
            let until = {
                let mut inside = self.lock();
                if inside.waiting.len() < UNPROVED_MAX {
                    return;
                }
                match inside.candidate() {
                    Some((number, until)) if until <= Instant::now() => {
                        inside.remove(number);
                        return;
                    }
                    Some((_, until)) => until,
                    None => return,
                }
            };
            let _ = timeout_at(until, freed).await;
        }
    }

    /// A place for a connection of this address.
    pub(crate) fn admit(&self, address: IpAddr) -> Place {
        let source = source(address);
        let (leave, stay) = oneshot::channel();
        let mut inside = self.lock();
        let number = inside.next;
        inside.next += 1;
        inside.waiting.insert(number, Waiting { source, since: Instant::now(), _stay: leave });
        inside.by_source.entry(source).or_default().insert(number);
        Place { door: self.clone(), number, stay }
    }

    /// The process has no descriptors left: somebody goes at once, if there is anybody.
    pub(crate) async fn make_way(&self) {
        if let Some((number, _)) = { self.lock().candidate() } {
            self.lock().remove(number);
        }
        // Its task has yet to close the socket.
        sleep(Duration::from_millis(5)).await;
    }

    /// Says in the log what became of a stranger, unless there were many such lines lately; then it counts, and the next line
    /// says how many were left out.
    pub(crate) fn tell(&self, peer: SocketAddr, refusal: Refusal, reason: &str) {
        let left_out = {
            let lines = &mut self.lock().lines;
            let now = Instant::now();
            if lines.since.is_none_or(|since| now - since >= Duration::from_secs(1)) {
                (lines.since, lines.written) = (Some(now), 0);
            }
            if lines.written == LINES_MAX {
                lines.left_out += 1;
                return;
            }
            lines.written += 1;
            std::mem::take(&mut lines.left_out)
        };
        match left_out {
            0 => tracing::warn!(%peer, %refusal, reason, "refused a connection"),
            _ => {
                tracing::warn!(%peer, %refusal, reason, left_out, "refused a connection, and others before it")
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // What is inside is consistent between any two statements.
        self.0.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    /// Who goes next, and from when: the oldest of the address that has most.
    fn candidate(&self) -> Option<(u64, Instant)> {
        let numbers = self.by_source.values();
        let most = numbers.max_by_key(|numbers| (numbers.len(), std::cmp::Reverse(numbers.first())))?;
        let number = *most.first()?;
        let since = self.waiting.get(&number)?.since;
        Some((number, if most.len() > HONEST_MAX { since } else { since + GRACE }))
    }

    fn remove(&mut self, number: u64) {
        let Some(Waiting { source, .. }) = self.waiting.remove(&number) else { return };
        if let Some(numbers) = self.by_source.get_mut(&source) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_source.remove(&source);
            }
        }
    }
}

impl Place {
    /// Ends when the connection has to go.
    pub(crate) async fn turned_away(&mut self) {
        let _ = (&mut self.stay).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.lock().remove(self.number);
        self.door.0.freed.notify_one();
    }
}

/// What counts as one address: of IPv6 the network of 64 bits, which one host has to itself.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::timeout;

    use super::*;

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0x0a00_0000 + number).into()
    }

    async fn admitted(door: &Door, number: u32) -> Place {
        door.room().await;
        door.admit(address(number))
    }

    fn is_turned_away(place: &mut Place) -> bool {
        !matches!(place.stay.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_most_pays_for_everybody() {
        let door = Door::default();
        let mut honest = admitted(&door, 1).await;
        let mut crowd = Vec::new();
        for _ in 0..10_000 {
            crowd.push(timeout(Duration::ZERO, admitted(&door, 2)).await.expect("no waiting"));
        }
        let mut late = timeout(Duration::ZERO, admitted(&door, 3)).await.expect("no waiting");
        assert!(!is_turned_away(&mut honest) && !is_turned_away(&mut late));
        let mut turned_away = crowd.iter_mut().map(is_turned_away);
        let first_that_stays = turned_away.position(|away| !away).unwrap();
        assert_eq!(crowd.len() - first_that_stays, UNPROVED_MAX - 2, "the youngest stay");
    }

    #[tokio::test(start_paused = true)]
    async fn honest_addresses_have_their_grace_and_freed_places_are_taken() {
        let door = Door::default();
        let mut all = Vec::new();
        for number in 0..UNPROVED_MAX as u32 {
            all.push(admitted(&door, number % 256).await);
        }
        assert!(timeout(GRACE / 2, door.room()).await.is_err(), "nobody goes yet");
        drop(all.pop());
        timeout(Duration::ZERO, door.room()).await.expect("there is room");
        all.push(door.admit(address(300)));
        timeout(GRACE, door.room()).await.expect("the oldest goes");
        assert_eq!(all.iter_mut().map(is_turned_away).position(|away| away), Some(0));
    }

    #[test]
    fn a_host_has_one_source() {
        let of = |text: &str| source(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:0:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }

    proptest! {
        /// Whatever comes and goes, both tables have the same connections, and those that are dropped are in neither.
        #[test]
        fn the_tables_agree(steps in prop::collection::vec((0..5u32, any::<bool>(), any::<prop::sample::Index>()), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _inside = runtime.enter();
            let door = Door::default();
            let mut places: Vec<(u32, Place)> = Vec::new();
            for (from, goes, which) in steps {
                if goes && !places.is_empty() {
                    places.swap_remove(which.index(places.len()));
                } else {
                    places.push((from, door.admit(address(from))));
                }
                let inside = door.lock();
                prop_assert_eq!(inside.waiting.len(), places.len());
                for number in 0..5 {
                    let expected = places.iter().filter(|(from, _)| *from == number).count();
                    let found = inside.by_source.get(&address(number)).map_or(0, BTreeSet::len);
                    prop_assert_eq!(found, expected);
                }
                if let Some((first, _)) = inside.candidate() {
                    let source = inside.waiting[&first].source;
                    let most = inside.by_source.values().map(BTreeSet::len).max();
                    prop_assert_eq!(Some(inside.by_source[&source].len()), most);
                    prop_assert_eq!(inside.by_source[&source].first(), Some(&first));
                }
            }
        }
    }
}
