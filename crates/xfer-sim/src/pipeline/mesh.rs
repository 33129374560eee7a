//! How a mesh gathers: what each member has, and how the rest reaches it.
//!
//! A member gets the shards of its counterparts on other hosts over its NICs, in a ring of hosts, and all that its neighbours
//! then have over NVLink. Nothing crosses between hosts twice: it must never count a shard on two ways.

/// The members of a mesh by host, all with equally many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Members {
    /// For each host, places in the mesh's list.
    hosts: Vec<Vec<usize>>,
    count: u64,
}

/// What one member gets in a gather, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Receipt {
    /// Which member, as a place in the mesh's list.
    pub(super) to: usize,
    /// Whose NICs send to it; itself where there is one host.
    pub(super) from: usize,
    /// Over NICs.
    pub(super) nic_bytes: u64,
    /// Over NVLink.
    pub(super) nvlink_bytes: u64,
}

impl Members {
    /// `None` if there are none, or hosts differ.
    pub(super) fn of(trainers: &[u32], gpus_per_host: u32) -> Option<Members> {
        let mut hosts: Vec<(u32, Vec<usize>)> = Vec::new();
        for (place, trainer) in trainers.iter().enumerate() {
            let host = trainer.checked_div(gpus_per_host)?;
            match hosts.iter_mut().find(|(known, _)| *known == host) {
                Some((_, places)) => places.push(place),
                None => hosts.push((host, vec![place])),
            }
        }
        let hosts: Vec<Vec<usize>> = hosts.into_iter().map(|(_, places)| places).collect();
        let each = hosts.first()?.len();
        let even = hosts.iter().all(|places| places.len() == each);
        even.then_some(Members { hosts, count: trainers.len() as u64 })
    }

    /// Members, at least 1.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Hosts, at least 1.
    pub(super) fn hosts(&self) -> u64 {
        self.hosts.len() as u64
    }

    /// What a member holds of so many bytes. Parts differ by one byte at most and sum up to all.
    pub(super) fn shard(&self, place: usize, bytes: u64) -> u64 {
        let start = |place: u64| u128::from(bytes) * u128::from(place) / u128::from(self.count);
        let place = place as u64;
        (start(place + 1) - start(place)) as u64 // at most `bytes`
    }

    /// How so many bytes reach every member.
    pub(super) fn receipts(&self, bytes: u64) -> impl Iterator<Item = Receipt> {
        let ring = self.hosts.iter().zip(self.hosts.iter().cycle().skip(self.hosts.len() - 1));
        ring.flat_map(|(own, before)| own.iter().zip(before)).enumerate().map(move |(nth, (&to, &from))| {
            let column = nth % (self.count / self.hosts()).max(1) as usize;
            let counterparts = self.hosts.iter().filter_map(|host| host.get(column));
            let all: u64 = counterparts.map(|&place| self.shard(place, bytes)).sum();
            let nic_bytes = all - self.shard(to, bytes);
            Receipt { to, from, nic_bytes, nvlink_bytes: bytes - all }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_hosts_exchange_and_share() {
        let members = Members::of(&[8, 9, 0, 1], 8).unwrap();
        assert_eq!(members.hosts(), 2);
        let receipts: Vec<Receipt> = members.receipts(100).collect();
        let receipt = |to, from| Receipt { to, from, nic_bytes: 25, nvlink_bytes: 50 };
        assert_eq!(receipts, [receipt(0, 2), receipt(1, 3), receipt(2, 0), receipt(3, 1)]);
    }

    #[test]
    fn every_member_gets_all_that_it_lacks() {
        for (trainers, bytes) in
            [(vec![0, 1, 2], 10), (vec![0, 8, 16, 1, 9, 17], 1000), (vec![3], 7), (vec![0, 9], 1)]
        {
            let members = Members::of(&trainers, 8).unwrap();
            let receipts: Vec<Receipt> = members.receipts(bytes).collect();
            let mut places: Vec<usize> = receipts.iter().map(|receipt| receipt.to).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..trainers.len()));
            for Receipt { to, from, nic_bytes, nvlink_bytes } in receipts {
                assert_eq!(members.shard(to, bytes) + nic_bytes + nvlink_bytes, bytes);
                assert_eq!(
                    nic_bytes > 0,
                    bytes > 1 && members.hosts() > 1 || bytes == 1 && to == 0 && from == 1
                );
            }
            assert_eq!((0..trainers.len()).map(|place| members.shard(place, bytes)).sum::<u64>(), bytes);
        }
    }

    #[test]
    fn uneven_members_are_refused() {
        assert_eq!(Members::of(&[0, 1, 8], 8), None);
        assert_eq!(Members::of(&[], 8), None);
    }
}
