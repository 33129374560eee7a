//! What the controller logs: every report once, in fields, with the attempt's name where there is one.
//!
//! A version that fails, a rank that is lost and a connection that is not let in are warnings; what goes well is told for
//! those who ask. Nothing is logged that a peer could make long: reasons are cut before they are reported.

use crate::controller::Report;

/// Logs a report.
pub(super) fn tell(report: &Report) {
    match report {
        Report::StandingBy { holder } => tracing::info!(holder, "standing by"),
        Report::InCharge { version } => tracing::info!(version, "in charge"),
        Report::Joined(rank) => tracing::debug!(%rank, "joined"),
        Report::Left(rank) => tracing::debug!(%rank, "left"),
        Report::Lost { rank, reason } => tracing::warn!(%rank, reason, "lost a rank"),
        Report::Refused { peer, refusal, reason } => {
            tracing::warn!(peer, %refusal, reason, "refused a connection");
        }
        Report::Regrouping { reason } => tracing::warn!(reason, "regrouping"),
        Report::Planned { digest, bytes, writes, bound_seconds, limited_by, without } => tracing::info!(
            plan = %digest,
            bytes,
            writes,
            bound_seconds,
            limited_by = limited_by.map(tracing::field::display),
            ?without,
            "planned"
        ),
        Report::Started => tracing::info!("all ranks are connected"),
        Report::Pushing { version, push } => tracing::info!(version, %push, "push began"),
        Report::Committed { version, push, elapsed } => {
            tracing::info!(version, %push, seconds = elapsed.as_secs_f64(), "committed");
        }
        Report::Aborted { version, push, stage, cause, reason } => {
            tracing::warn!(version, %push, %stage, cause = cause.name(), reason, "push aborted");
        }
        Report::Ended { reason: None } => tracing::info!("the job is over"),
        // Who runs the controller is told by its result; what led to it has been logged.
        Report::Ended { reason: Some(reason) } => tracing::info!(reason, "the job has ended"),
    }
}
