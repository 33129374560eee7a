//! Which faults come when: drawn from a seed alone, so that the seed repeats them. It touches nothing.

use std::fmt;
use std::time::Duration;

use super::random::Random;
use super::weights::WORLD;

/// A process of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Who {
    Controller,
    Trainer(u32),
    Inference(u32),
}

impl Who {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let trainers = (0..WORLD.trainers).map(Self::Trainer);
        [Self::Controller].into_iter().chain(trainers).chain((0..WORLD.inference).map(Self::Inference))
    }

    /// Without its number.
    pub(super) fn role(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Trainer(_) => "trainer",
            Self::Inference(_) => "inference rank",
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => f.write_str("controller"),
            Self::Trainer(rank) => write!(f, "trainer {rank}"),
            Self::Inference(rank) => write!(f, "inference {rank}"),
        }
    }
}

/// What happens to one process or link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    /// SIGKILL; started again later.
    Kill(Who),
    /// SIGSTOP; SIGCONT later.
    Stop(Who),
    /// The NIC of this link on one side is set down; up later.
    LinkDown { on_trainers: bool, link: u16 },
    /// The NIC loses its address; gets it again later.
    NoAddress { on_trainers: bool, link: u16 },
    /// The NIC over which inference ranks speak with the controller is set down on one side; up later.
    ControlDown { on_trainers: bool },
}

impl Blow {
    /// What is counted together.
    pub(super) fn kind(self) -> String {
        match self {
            Self::Kill(who) => format!("kill -9: {}", who.role()),
            Self::Stop(who) => format!("SIGSTOP: {}", who.role()),
            Self::LinkDown { .. } => "NIC: set down".into(),
            Self::NoAddress { .. } => "NIC: address deleted".into(),
            Self::ControlDown { .. } => "control link: set down".into(),
        }
    }

    /// The process that it hits.
    pub(super) fn who(self) -> Option<Who> {
        match self {
            Self::Kill(who) | Self::Stop(who) => Some(who),
            Self::LinkDown { .. } | Self::NoAddress { .. } | Self::ControlDown { .. } => None,
        }
    }
}

/// Blows at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fault {
    /// Since the one before.
    pub(super) after: Duration,
    /// Then so long after the next push has begun.
    pub(super) into_push: Option<Duration>,
    /// And for how long each lasts.
    pub(super) blows: Vec<(Blow, Duration)>,
}

/// The faults of one job, without an end.
pub(super) struct Schedule {
    random: Random,
    deadline: Duration,
    links: u16,
}

impl Schedule {
    /// Of a job with this deadline, in a lab of so many links or none.
    pub(super) fn new(seed: u64, deadline: Duration, links: u16) -> Self {
        Self { random: Random::new(seed), deadline, links }
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.random.below(to - from))
    }

    /// Mostly so short that nobody may notice, now and then so long that everybody must.
    fn length(&mut self) -> Duration {
        match self.random.below(100) {
            0..70 => self.millis(5, 400),
            70..85 => self.millis(400, 1000),
            _ => self.long(),
        }
    }

    /// Longer than the silence that the controller puts up with.
    fn long(&mut self) -> Duration {
        self.deadline / 2 + self.deadline.mul_f64(self.random.below(1000) as f64 / 1000.0)
    }

    /// So long that others have pushed further meanwhile, where they can.
    fn overslept(&mut self) -> Duration {
        self.deadline.mul_f64(0.75 + 0.75 * self.random.below(1000) as f64 / 1000.0)
    }

    fn blow(&mut self) -> Blow {
        if self.links > 0 && self.random.percent(40) {
            let link = self.random.below(u64::from(self.links)) as u16;
            let on_trainers = self.random.percent(50);
            return match self.random.below(100) {
                0..45 => Blow::LinkDown { on_trainers, link },
                45..75 => Blow::NoAddress { on_trainers, link },
                _ => Blow::ControlDown { on_trainers },
            };
        }
        let who = match self.random.below(100) {
            0..16 => Who::Controller,
            16..58 => Who::Trainer(self.random.below(u64::from(WORLD.trainers)) as u32),
            _ => Who::Inference(self.random.below(u64::from(WORLD.inference)) as u32),
        };
        if self.random.percent(50) { Blow::Kill(who) } else { Blow::Stop(who) }
    }
}

impl Iterator for Schedule {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        let after = match self.random.below(100) {
            0..60 => self.millis(100, 900),
            60..90 => self.millis(900, 1800),
            _ => self.millis(1800, 3500),
        };
        let into_push = self.random.percent(60).then(|| Duration::from_micros(self.random.below(8_000)));
        let blows = match self.random.below(100) {
            0..85 => 1,
            85..95 => 2,
            _ => 3,
        };
        let blow = |_| {
            let blow = self.blow();
            // These are stopped in the middle of a write.
            let is_aimed = into_push.is_some() && matches!(blow, Blow::Stop(Who::Trainer(_)));
            let is_long = is_aimed && self.random.percent(80);
            (blow, if is_long { self.overslept() } else { self.length() })
        };
        let blows = (0..blows).map(blow).collect();
        Some(Fault { after, into_push, blows })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(2);

    fn faults(seed: u64, links: u16) -> Vec<Fault> {
        Schedule::new(seed, DEADLINE, links).take(600).collect()
    }

    #[test]
    fn a_seed_repeats_its_faults_and_another_has_others() {
        assert_eq!(faults(1, 3), faults(1, 3));
        assert_ne!(faults(1, 3), faults(2, 3));
    }

    #[test]
    fn about_one_fault_a_second_of_every_kind_on_everybody() {
        for links in [0, 3] {
            let faults = faults(7, links);
            let pause: Duration = faults.iter().map(|fault| fault.after).sum();
            assert!(pause < Duration::from_secs(600), "{pause:?}");
            let blows = || faults.iter().flat_map(|fault| &fault.blows);
            let hit: BTreeSet<Who> = blows().filter_map(|(blow, _)| blow.who()).collect();
            assert_eq!(hit, Who::all().collect());
            let kinds: BTreeSet<String> = blows().map(|(blow, _)| blow.kind()).collect();
            assert_eq!(kinds.len(), if links > 0 { 9 } else { 6 }, "{kinds:?}");
            let longer = |than: Duration| blows().filter(|(_, length)| *length > than).count();
            assert!(
                longer(DEADLINE) > 20
                    && longer(DEADLINE) < longer(DEADLINE / 4)
                    && longer(DEADLINE * 3 / 2) == 0
            );
            assert!(faults.iter().any(|fault| fault.blows.len() > 1 && fault.into_push.is_some()));
        }
    }
}
