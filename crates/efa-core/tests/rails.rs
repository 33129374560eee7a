//! Each operation over each provider that a laptop has: the bytes arrive, and the buffers come back.

mod common;

use std::collections::VecDeque;

use common::{Pair, bytes_of, info, lease_of, pattern, shared, unique, until};
use efa_core::{
    Closed, Completion, LeaseMut, Message, OpKind, PeerError, PostError, Provider, Rail, RailConfig,
    RailError, Read, Receive, RegionError, RejectReason, RemoteRegion, Write,
};

/// Runs a test over every provider that needs no NIC and that this libfabric has.
fn each_provider(test: impl Fn(&mut Pair)) {
    for provider in [Provider::Tcp, Provider::TcpRxm, Provider::Shm] {
        if let Some(info) = info(provider) {
            println!("over {info}");
            test(&mut Pair::open(&info, &RailConfig::for_info(&info)));
        }
    }
}

/// A write of a part of a source to the same offset of a target.
fn write_at(
    pair: &Pair,
    source: &(efa_core::Lease, efa_core::RegionId),
    remote: &RemoteRegion,
    at: usize,
    len: usize,
) -> Write {
    Write {
        from: source.0.slice(at..at + len).unwrap(),
        region: source.1,
        to: pair.to,
        remote: remote.at(at as u64, len as u64).unwrap(),
        immediate: None,
        delivery_complete: true,
        token: at as u64,
    }
}

#[test]
fn a_write_lands_and_its_lease_comes_back() {
    each_provider(|pair| {
        for (token, len) in [1, 7, 64, 4096, 65_537, 8 << 20].into_iter().enumerate() {
            let bytes = pattern(token as u64, len);
            let source = pair.source(&bytes);
            let (target, region, remote) = pair.target(len + 20);
            let write = Write {
                from: source.0,
                region: source.1,
                to: pair.to,
                remote: remote.at(10, len as u64).unwrap(),
                immediate: Some(u32::MAX - token as u32),
                delivery_complete: true,
                token: token as u64,
            };
            pair.write(write);
            assert_eq!(pair.sender.in_flight(), 1);
            let (mut ours, mut theirs) = pair.collect(1, 1);
            match (ours.pop(), ours.pop()) {
                (Some(Completion::Op { token: back, kind, peer, result, lease, .. }), None) => {
                    assert_eq!((back, kind, peer), (token as u64, OpKind::Write, Some(pair.to)));
                    assert_eq!(result.unwrap().bytes, len);
                    assert_eq!(
                        shared(lease).thaw().unwrap().bytes(),
                        bytes,
                        "the only handle on the same bytes"
                    );
                }
                other => panic!("{other:?}"),
            }
            match (theirs.pop(), theirs.pop()) {
                (Some(Completion::Immediate { data }), None) => assert_eq!(data, u32::MAX - token as u32),
                other => panic!("{other:?}"),
            }
            let expected: Vec<u8> = [&[0; 10], &bytes[..], &[0; 10]].concat();
            assert!(bytes_of(&target) == expected, "{len} bytes differ");
            assert_eq!(pair.sender.in_flight(), 0);
            pair.receiver.close_region(region).unwrap();
        }
    });
}

#[test]
fn what_others_write_to_can_be_sent_on() {
    each_provider(|pair| {
        let bytes = pattern(8, 100_000);
        let len = bytes.len();
        let from = lease_of(&bytes).thaw().unwrap().expose();
        let region = pair.sender.register(from.memory()).unwrap();
        let (target, _, remote) = pair.target(len);
        let write = Write {
            from: from.slice(1..len).unwrap(),
            region,
            to: pair.to,
            remote: remote.at(0, len as u64 - 1).unwrap(),
            immediate: Some(7),
            delivery_complete: true,
            token: 1,
        };
        pair.write(write);
        let (mut ours, theirs) = pair.collect(1, 1);
        let Some(Completion::Op { lease, .. }) = ours.pop() else { panic!("{ours:?}") };
        assert_eq!(lease.target().unwrap().len(), len - 1);
        assert!(matches!(theirs[..], [Completion::Immediate { data: 7 }]), "{theirs:?}");
        assert!(bytes_of(&target)[..len - 1] == bytes[1..]);
    });
}

#[test]
fn an_empty_write_carries_its_immediate() {
    // Not over shm: that of 1.17 loses it.
    for provider in [Provider::Tcp, Provider::TcpRxm] {
        let Some(info) = info(provider) else { continue };
        let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
        let source = pair.source(b"x");
        let (target, _, remote) = pair.target(1);
        let write = Write { immediate: Some(5), ..write_at(pair, &source, &remote, 0, 0) };
        pair.write(write);
        let (ours, theirs) = pair.collect(1, 1);
        assert!(
            matches!(&ours[..], [Completion::Op { result: Ok(done), .. }] if done.bytes == 0),
            "{ours:?}"
        );
        assert!(matches!(theirs[..], [Completion::Immediate { data: 5 }]), "{theirs:?}");
        assert_eq!(bytes_of(&target), [0]);
    }
}

#[test]
fn a_read_fetches_frozen_bytes() {
    each_provider(|pair| {
        let bytes = pattern(3, 100_000);
        let shared_bytes = lease_of(&bytes);
        let (_, remote) = pair.receiver.share(&shared_bytes).unwrap();
        let into = LeaseMut::zeroed(70_000).unwrap();
        let region = pair.sender.register(into.memory()).unwrap();
        let mut read =
            Some(Read { into, region, from: pair.to, remote: remote.at(20_000, 70_000).unwrap(), token: 9 });
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        until("the read", || {
            if let Some(op) = read.take() {
                read = pair.sender.read(op).err().map(|rejected| rejected.op);
            }
            pair.poll_into(&mut ours, &mut theirs);
            (!ours.is_empty()).then_some(())
        });
        assert!(theirs.is_empty(), "the owner of the bytes sees nothing: {theirs:?}");
        match ours.pop() {
            Some(Completion::Op { token: 9, kind: OpKind::Read, result, lease, .. }) => {
                assert_eq!(result.unwrap().bytes, 70_000);
                assert!(unique(lease).bytes() == &bytes[20_000..90_000]);
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_message_meets_a_posted_receive() {
    each_provider(|pair| {
        let into = LeaseMut::zeroed(100).unwrap();
        let region = pair.receiver.register(into.memory()).unwrap();
        pair.receiver.receive(Receive { into, region, token: 1 }).unwrap();
        assert_eq!(pair.receiver.in_flight(), 1);
        let (from, region) = pair.source(b"forty-two");
        let mut send = Some(Message { from, region, to: pair.to, token: 2 });
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        until("the message", || {
            if let Some(op) = send.take() {
                send = pair.sender.send(op).err().map(|rejected| rejected.op);
            }
            pair.poll_into(&mut ours, &mut theirs);
            (!ours.is_empty() && !theirs.is_empty()).then_some(())
        });
        assert!(matches!(ours[..], [Completion::Op { token: 2, kind: OpKind::Send, result: Ok(_), .. }]));
        match theirs.pop() {
            Some(Completion::Op { token: 1, kind: OpKind::Receive, peer: None, result, lease, .. }) => {
                let len = result.unwrap().bytes;
                assert_eq!(&unique(lease).bytes()[..len], b"forty-two");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_batch_is_posted_from_the_front_and_lands_whole() {
    each_provider(|pair| {
        const WRITES: usize = 500;
        const BYTES: usize = 3000;
        let bytes = pattern(4, WRITES * BYTES);
        let source = pair.source(&bytes);
        let (target, _, remote) = pair.target(bytes.len());
        let mut queue: VecDeque<Write> = (0..WRITES)
            .map(|index| Write {
                immediate: Some(index as u32),
                ..write_at(pair, &source, &remote, index * BYTES, BYTES)
            })
            .collect();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut posted = 0;
        until("the batch", || {
            posted += pair.sender.write_batch(&mut queue).unwrap();
            assert_eq!(posted + queue.len(), WRITES);
            assert!(pair.sender.in_flight() <= RailConfig::default().writes_max as usize);
            pair.poll_into(&mut ours, &mut theirs);
            (ours.len() == WRITES && theirs.len() == WRITES).then_some(())
        });
        assert!(bytes_of(&target) == bytes);
        let mut tokens: Vec<u64> = ours
            .iter()
            .map(|completion| match completion {
                Completion::Op { token, result: Ok(_), .. } => *token,
                other => panic!("{other:?}"),
            })
            .collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq((0..WRITES).map(|index| (index * BYTES) as u64)));
        let mut numbers: Vec<u32> = theirs
            .iter()
            .map(|completion| match completion {
                Completion::Immediate { data } => *data,
                other => panic!("{other:?}"),
            })
            .collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..WRITES as u32));
    });
}

#[test]
fn a_full_table_gives_the_write_back() {
    let Some(info) = common::tcp() else { return };
    let config = RailConfig { writes_max: 2, ..RailConfig::for_info(&info) };
    let pair = &mut Pair::open(&info, &config);
    let source = pair.source(&pattern(5, 100));
    let (target, _, remote) = pair.target(100);
    for at in [0, 10] {
        let write = write_at(pair, &source, &remote, at, 10);
        pair.write(write);
    }
    assert_eq!(pair.sender.room(), 0);
    let rejected = pair.sender.write(write_at(pair, &source, &remote, 20, 10)).unwrap_err();
    assert!(matches!(rejected.reason, RejectReason::TableFull), "{rejected}");
    assert_eq!(rejected.op.token, 20, "it comes back as it went in");
    pair.collect(2, 0);
    assert_eq!(pair.sender.room(), 2);
    pair.write(rejected.op);
    pair.collect(1, 0);
    assert!(bytes_of(&target)[..30] == pattern(5, 100)[..30]);
}

#[test]
fn posts_are_refused_while_nobody_answers() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let source = pair.source(&[7; 16]);
    let (_, _, remote) = pair.target(16);
    // The receiver is not polled, so it accepts no connection.
    let rejected = pair.sender.write(write_at(pair, &source, &remote, 0, 16)).unwrap_err();
    assert!(matches!(rejected.reason, RejectReason::Again), "{rejected}");
    assert_eq!((pair.sender.in_flight(), rejected.op.token), (0, 0));
    let mut queue = VecDeque::from([rejected.op]);
    assert_eq!(pair.sender.write_batch(&mut queue).unwrap(), 0);
    assert_eq!(queue.len(), 1, "the refused write is at the front again");
    pair.write(queue.pop_front().unwrap());
    pair.collect(1, 0);
}

#[test]
fn misfits_are_refused_before_the_provider_sees_them() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let source = pair.source(&[7; 16]);
    let stranger = lease_of(&[7; 16]);
    let (_, _, remote) = pair.target(16);
    let good = |pair: &Pair| write_at(pair, &source, &remote, 0, 16);
    let reason = |pair: &mut Pair, write: Write| match pair.sender.write(write).unwrap_err().reason {
        RejectReason::Fatal(error) => *error,
        other => panic!("{other}"),
    };

    let write = Write { from: stranger.clone(), ..good(pair) };
    assert!(matches!(reason(pair, write), PostError::OutsideRegion { .. }));
    let write = Write { remote: remote.at(0, 15).unwrap(), ..good(pair) };
    assert!(matches!(reason(pair, write), PostError::Length { local_bytes: 16, remote_bytes: 15, .. }));

    let closed = pair.sender.register(stranger.memory()).unwrap();
    assert_eq!(pair.sender.close_region(closed).unwrap(), Closed::Released);
    let write = Write { region: closed, ..good(pair) };
    assert!(matches!(reason(pair, write), PostError::UnknownRegion { .. }));
    assert!(matches!(pair.sender.close_region(closed), Err(RegionError::Unknown { .. })));

    let third = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    let gone = pair.sender.insert_peer(third.address()).unwrap();
    pair.sender.remove_peer(gone).unwrap();
    let write = Write { to: gone, ..good(pair) };
    assert!(matches!(reason(pair, write), PostError::UnknownPeer { .. }));
    assert!(matches!(pair.sender.remove_peer(gone), Err(PeerError::Unknown { .. })));

    // A batch stops at the misfit, which stays at the front.
    let mut queue = VecDeque::from([Write { region: closed, ..good(pair) }, good(pair)]);
    assert!(pair.sender.write_batch(&mut queue).is_err());
    assert!(queue.len() == 2 && queue[0].region == closed);
    assert_eq!(pair.sender.in_flight(), 0);
    assert!(good(pair).from.memory().ptr_eq(source.0.memory()));
}

#[test]
fn what_is_in_use_cannot_be_closed() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let source = pair.source(&[7; 16]);
    let (_, _, remote) = pair.target(16);
    let write = write_at(pair, &source, &remote, 0, 16);
    pair.write(write);
    let error = pair.sender.close_region(source.1).unwrap_err();
    assert!(matches!(error, RegionError::Busy { in_flight: 1, .. }), "{error}");
    let error = pair.sender.remove_peer(pair.to).unwrap_err();
    assert!(matches!(error, PeerError::Busy { in_flight: 1, .. }), "{error}");
    pair.collect(1, 0);
    pair.sender.close_region(source.1).unwrap();
    pair.sender.remove_peer(pair.to).unwrap();
}

#[test]
fn a_target_is_reclaimed_once_nothing_can_write_to_it() {
    let Some(info) = common::tcp() else { return };
    let mut pair = Pair::open(&info, &RailConfig::for_info(&info));
    let (target, region, _) = pair.target(16);
    let target = target.reclaim().unwrap_err();
    // TCP is moved by software, which may be in the middle of a write that it admitted before.
    assert_eq!(pair.receiver.close_region(region).unwrap(), Closed::HeldUntilRailCloses);
    let target = target.reclaim().unwrap_err();
    pair.receiver.close().unwrap();
    assert!(target.reclaim().is_ok());
}

#[test]
fn keys_cannot_be_guessed_from_each_other() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let mut keys: Vec<u64> = (0..64).map(|_| pair.target(8).2.key).collect();
    keys.sort_unstable();
    // 64 random keys of 63 bits or more come closer to each other than this once in 10^8 runs.
    assert!(keys.windows(2).all(|pair| pair[1] - pair[0] > 1 << 24), "{keys:x?}");
}

#[test]
fn nothing_cannot_be_exposed() {
    let Some(info) = common::tcp() else { return };
    let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    let target = LeaseMut::zeroed(0).unwrap().expose();
    assert!(matches!(rail.expose(&target), Err(RegionError::Empty { .. })));
    rail.register(target.memory()).unwrap();
}

#[test]
fn configurations_beyond_the_provider_are_refused() {
    let Some(info) = common::tcp() else { return };
    let good = RailConfig::for_info(&info);
    for config in [
        RailConfig { writes_max: 0, ..good.clone() },
        RailConfig { writes_max: u32::MAX, ..good.clone() },
        RailConfig { receives_max: 0, ..good.clone() },
        RailConfig { immediates_max: u32::MAX, ..good.clone() },
    ] {
        let error = Rail::open(&info, &config).unwrap_err();
        assert!(matches!(error, RailError::Config { .. }), "{config:?}: {error}");
    }
}

#[test]
fn an_address_names_one_peer_at_a_time() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let error = pair.sender.insert_peer(pair.receiver.address()).unwrap_err();
    assert!(matches!(error, PeerError::Known { peer, .. } if peer == pair.to), "{error}");
    pair.sender.remove_peer(pair.to).unwrap();
    let again = pair.sender.insert_peer(pair.receiver.address()).unwrap();
    assert_ne!(again, pair.to);
    // And it can be written.
    pair.to = again;
    let source = pair.source(&[7; 16]);
    let (target, _, remote) = pair.target(16);
    let write = write_at(pair, &source, &remote, 0, 16);
    pair.write(write);
    pair.collect(1, 0);
    assert_eq!(bytes_of(&target), [7; 16]);
}

#[test]
fn foreign_addresses_are_refused() {
    let Some(info) = common::tcp() else { return };
    let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    let own = rail.address().as_bytes().to_vec();
    let mut other_family = own.clone();
    other_family[0] ^= 0xff;
    let longer = [&own[..], &[0]].concat();
    for bytes in [vec![0; 1], own[..own.len() - 1].to_vec(), longer, other_family, vec![0xff; 256]] {
        let address = bytes.clone().try_into().unwrap();
        let error = rail.insert_peer(&address).unwrap_err();
        assert!(matches!(error, PeerError::Address { .. }), "{bytes:?}: {error}");
    }
    assert!(efa_core::RailAddress::try_from(Vec::new()).is_err());
    assert!(efa_core::RailAddress::try_from(vec![0; 257]).is_err());
    // The same bounds hold for what comes off the wire.
    let wire = postcard::to_stdvec(&vec![1_u8; 257]).unwrap();
    assert!(postcard::from_bytes::<efa_core::RailAddress>(&wire).is_err());
    let wire = postcard::to_stdvec(rail.address()).unwrap();
    assert_eq!(postcard::from_bytes::<efa_core::RailAddress>(&wire).unwrap(), *rail.address());
}
