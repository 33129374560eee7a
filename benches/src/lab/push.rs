//! Ranks as processes in both namespaces, and their pushes.

use weightsync::PushReport;
use weightsync_lab::{Lab, Side};

use super::job::Job;
use crate::process::Process;

/// A job that runs. Its processes are killed when this is dropped.
pub(crate) struct Ranks {
    trainers: Vec<Process>,
    inference: Vec<Process>,
    controller: Process,
}

/// One push, as its trainers saw it.
pub(crate) struct Pushed {
    pub(crate) reports: Vec<PushReport>,
}

impl Ranks {
    /// Starts the ranks of a job, which join it.
    pub(crate) fn start(lab: &Lab, job: &Job) -> anyhow::Result<Self> {
        let here = std::env::current_exe()?;
        let start = |side, words: &[&str]| Process::launch(lab.command(side, &here), words);
        let text = serde_json::to_string(job)?;
        let mut controller = start(Side::A, &["lab-controller", &text])?;
        let address: String = controller.answer()?;
        let ranks = |side, role: &str, ranks: u32| -> anyhow::Result<Vec<Process>> {
            (0..ranks).map(|rank| start(side, &[role, &address, &rank.to_string(), &text])).collect()
        };
        let inference = ranks(Side::B, "lab-inference", job.inference)?;
        let trainers = ranks(Side::A, "lab-trainer", job.trainers)?;
        Ok(Self { trainers, inference, controller })
    }

    /// All trainers push a version.
    pub(crate) fn push(&mut self) -> anyhow::Result<Pushed> {
        for trainer in &mut self.trainers {
            trainer.ask("push")?;
        }
        let reports = self.trainers.iter_mut().map(Process::answer).collect::<anyhow::Result<_>>()?;
        Ok(Pushed { reports })
    }

    /// Trainers and inference ranks.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Process> {
        self.trainers.iter().chain(&self.inference)
    }

    /// The trainers leave, which ends the job.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let Self { trainers, inference, controller } = self;
        trainers.into_iter().chain(inference).chain([controller]).try_for_each(Process::finish)
    }
}

impl Pushed {
    pub(crate) fn bytes(&self) -> u64 {
        self.reports.iter().map(|report| report.bytes).sum()
    }

    pub(crate) fn writes(&self) -> u64 {
        self.reports.iter().map(|report| report.writes).sum()
    }

    /// Seconds in which the slowest trainer wrote: from being told to write to its last WRITE's delivery.
    pub(crate) fn write_seconds(&self) -> f64 {
        self.reports.iter().map(|report| report.write_seconds).fold(0.0, f64::max)
    }

    /// Bytes by trainer and rail.
    pub(crate) fn by_rail(&self) -> Vec<Vec<u64>> {
        self.reports.iter().map(|report| report.rails.iter().map(|rail| rail.bytes).collect()).collect()
    }
}
