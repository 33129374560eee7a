//! What the program says on standard output. A reader that goes away, as `head` does, ends the program: not with a
//! panic, and not by going on for nobody.

use std::fmt;
use std::io::{self, ErrorKind, Write};

use crate::EXIT_FAILED;

/// Prints a line; takes what `println!` takes.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// See the macro.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout().lock(), "{text}") {
        if error.kind() != ErrorKind::BrokenPipe {
            eprintln!("weightsync: cannot write to standard output: {error}");
        }
        std::process::exit(EXIT_FAILED.into());
    }
}
