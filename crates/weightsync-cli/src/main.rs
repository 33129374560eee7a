//! The `weightsync` command.

#![forbid(unsafe_code)]

mod args;
mod children;
mod commands;
mod events;
mod logs;
mod losses;
mod say;
mod spinner;
mod table;
mod trace;

use std::process::ExitCode;

use crate::args::{Cli, Command};
use crate::events::{BytesDiffer, EXIT_BYTES_DIFFER};

/// A run that failed: an error, a lost rank, a deadline.
const EXIT_FAILED: u8 = 1;

/// What clap ends with on wrong usage.
const EXIT_USAGE: u8 = 2;

/// Input of which only a look at all of it tells that it is wrong. The program ends as clap does.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct WrongInput(String);

fn main() -> ExitCode {
    let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    let cli = args::parse(std::env::args_os(), &variable).unwrap_or_else(|error| error.exit());
    let format = cli.log_format;
    logs::start(format);
    // Rails and heartbeats have threads of their own: what is left to this runtime waits for messages.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logs::last_word(format, &with_causes(&error));
            let code = if error.is::<BytesDiffer>() {
                EXIT_BYTES_DIFFER
            } else if error.is::<WrongInput>() {
                EXIT_USAGE
            } else {
                EXIT_FAILED
            };
            ExitCode::from(code)
        }
    }
}

/// The error, and those of its causes that its message does not tell already.
fn with_causes(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        _ if told.contains(&cause) => told,
        _ => format!("{told}: {cause}"),
    })
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Demo(args) => commands::demo::run(args).await,
        Command::Controller(args) => commands::controller::run(args).await,
        Command::Push(args) => commands::push::run(args).await,
        Command::Serve(args) => commands::serve::run(args).await,
        Command::Status(args) => commands::status::run(args).await,
        Command::Info(args) => commands::info::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Simulate(args) => commands::simulate::run(&args),
        Command::Topo(args) => commands::topo::run(&args),
        Command::Traffic(args) => commands::traffic::run(&args),
    }
}
