//! Bytes as frames from the controller to a member, and what the halves of a trainer and of an inference rank make of them.
//!
//! The first byte says what the inference rank is and how steps end, the second how often both join again.

#![no_main]

use std::time::Duration;

use rendezvous::member::{InferenceMember, InferenceStep, Served, TrainerMember};
use rendezvous::{Holds, Join, MemberManifest, SessionId, World};
use xfer_plan::{Rank, ReceiverManifest, ReceiverRank, TrainerManifest, TrainerRank};

fn join(member: Rank) -> Join {
    let (host, regions, rails) = (String::new(), Vec::new(), Vec::new());
    let manifest = match member {
        Rank::Trainer(_) => {
            MemberManifest::Trainer(TrainerManifest { host, regions, rails, pieces: Vec::new() })
        }
        Rank::Receiver(_) => {
            MemberManifest::Inference(ReceiverManifest { host, regions, rails, params: Vec::new() })
        }
    };
    Join {
        job: String::new(),
        member,
        world: World { trainers: 1, inference: 1 },
        deadline: Duration::from_secs(1),
        manifest,
        endpoint: Vec::new(),
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [kind, often, frames @ ..] = bytes else { return };
    let (stages, well) = (kind & 1 == 1, kind & 2 == 2);
    let result = || if well { Ok((0, 0)) } else { Err("no".to_owned()) };
    let closed = || if well { Ok(()) } else { Err("no".to_owned()) };
    let (mut trains, mut serves) = (TrainerMember::new(), InferenceMember::new(stages));
    for (number, message) in rendezvous::fuzzing::to_member(frames).into_iter().enumerate() {
        if trains.is_out() || number % (usize::from(*often) + 1) == 0 {
            trains.rejoin(join(Rank::Trainer(TrainerRank(0))));
        }
        if serves.is_out() || number % (usize::from(*often) + 2) == 0 {
            serves.rejoin(join(Rank::Receiver(ReceiverRank(0))));
        }
        let _ = trains.handle(message.clone());
        trains.ready();
        trains.begin(1);
        trains.measured(if well { Ok(Vec::new()) } else { Err("no".to_owned()) });
        trains.written(result(), Vec::new(), Vec::new());
        trains.take_missed_commit();
        match serves.handle(message) {
            Ok(Some(InferenceStep::Prepare { .. })) => drop(serves.prepared(closed())),
            Ok(Some(InferenceStep::Fence { .. })) => drop(serves.fenced(closed())),
            Ok(Some(InferenceStep::Verify { .. })) => drop(serves.verified(closed())),
            Ok(Some(InferenceStep::Commit { .. })) => drop(serves.committed()),
            _ => {}
        }
        serves.ready();
        serves.relayed(result(), Vec::new(), Vec::new());
        serves.take_missed_commit();
        assert!(!stages || !matches!(serves.served(), Served::Torn(_)), "it stages, and is torn");
    }
});
