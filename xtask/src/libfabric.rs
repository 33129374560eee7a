//! Which libfabric the demo and the tests use: the one that is named, the one that we built, the system's, or a new one.
//!
//! Whether a library serves is asked of the library itself, by the `version` example of `libfabric-sys`. Nothing is
//! guessed from file names.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Failure, libfabric_build, step, workspace};

/// The variable by which every program of the workspace is told which libfabric to open.
pub(crate) const VARIABLE: &str = "LIBFABRIC_SO";

/// A libfabric that can carry a push between processes of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Libfabric {
    /// What [`VARIABLE`] is set to: a path, or a bare name for the dynamic linker.
    pub(crate) path: PathBuf,
    version: String,
    pub(crate) provider: Provider,
}

/// How a libfabric does reliable datagrams over TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provider {
    /// Natively, from 1.18 on.
    Tcp,
    /// Through a layer of its own: slower.
    TcpRxm,
}

impl Provider {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::TcpRxm => "tcp;ofi_rxm",
        }
    }
}

/// The cargo profile in which the probe is built: that of what is built afterwards, so that nothing is built twice.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// `cargo xtask libfabric`.
pub(crate) fn run(_: &[String]) -> Result<(), Failure> {
    let library = find_or_build(Profile::Dev)?;
    println!("{VARIABLE}={}", library.path.display());
    Ok(())
}

/// Whether the person says which libfabric to use. Then no other is taken in its place.
pub(crate) fn is_named() -> bool {
    named().is_some()
}

fn named() -> Option<PathBuf> {
    env::var_os(VARIABLE).filter(|named| !named.is_empty()).map(PathBuf::from)
}

/// A usable libfabric, built if none is there, or why there is none. Says on standard output what it took.
pub(crate) fn find_or_build(profile: Profile) -> Result<Libfabric, Failure> {
    let probe = Probe::build(profile)?;
    if let Some(mut named) = named() {
        // Tests run in other folders. A bare name is the dynamic linker's to find.
        if named.components().count() > 1 {
            named = std::path::absolute(&named).map_err(|error| format!("{VARIABLE}: {error}"))?;
        }
        return match probe.ask(Some(&named)) {
            Ok(found) => Ok(announced(found)),
            Err(why) => Err(format!("{VARIABLE} names a libfabric that does not serve: {why}")),
        };
    }
    let prefix = libfabric_build::prefix()?;
    let ours = libfabric_build::library(&prefix);
    if libfabric_build::is_complete(&prefix)
        && let Ok(found) = probe.ask(Some(&ours))
    {
        return Ok(announced(found));
    }
    let of_system = probe.ask(None);
    if let Ok(found) = &of_system
        && found.provider == Provider::Tcp
    {
        return Ok(announced(found.clone()));
    }
    println!("no libfabric with native tcp here (1.18 or newer): building one");
    match (libfabric_build::build(&prefix).and_then(|()| probe.ask(Some(&ours))), of_system) {
        (Ok(found), _) => Ok(announced(found)),
        (Err(why), Ok(old)) => {
            println!("could not build libfabric: {why}");
            Ok(announced(old))
        }
        (Err(why), Err(of_system)) => {
            Err(format!("could not build libfabric: {why}\nand the system has none: {of_system}"))
        }
    }
}

fn announced(library: Libfabric) -> Libfabric {
    let note = match library.provider {
        Provider::Tcp => "",
        Provider::TcpRxm => " (older than 1.18: slower than native tcp)",
    };
    let (version, path, provider) = (&library.version, library.path.display(), library.provider.name());
    println!("libfabric {version}: {path}, provider {provider}{note}");
    library
}

/// The program that opens a libfabric and tells what it is.
struct Probe {
    program: PathBuf,
}

impl Probe {
    fn build(profile: Profile) -> Result<Self, Failure> {
        let (flags, folder): (&[&str], _) = match profile {
            Profile::Dev => (&[], "debug"),
            Profile::Release => (&["--release"], "release"),
        };
        let mut cargo = workspace::cargo();
        cargo.args(["build", "--package", "libfabric-sys", "--example", "version"]).args(flags);
        step::shown("build the libfabric probe", &mut cargo)?;
        Ok(Self { program: workspace::target()?.join(folder).join("examples/version") })
    }

    /// Opens `library`, or whatever the search path has. An error is for a person.
    fn ask(&self, library: Option<&Path>) -> Result<Libfabric, Failure> {
        let mut probe = Command::new(&self.program);
        match library {
            Some(path) => probe.env(VARIABLE, path),
            None => probe.env_remove(VARIABLE),
        };
        let output =
            probe.output().map_err(|error| format!("cannot run {}: {error}", self.program.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{} ({})", said.trim(), output.status));
        }
        parse(&String::from_utf8_lossy(&output.stdout))
    }
}

/// Reads the probe's lines: `path P`, `version V`, and `provider P` for each one with reliable datagrams.
fn parse(said: &str) -> Result<Libfabric, Failure> {
    let values = |key: &'static str| {
        said.lines()
            .filter_map(move |line| line.split_once(' ').filter(|(k, _)| *k == key))
            .map(|(_, value)| value)
    };
    let (Some(path), Some(version)) = (values("path").next(), values("version").next()) else {
        return Err(format!("the libfabric probe said something unexpected: {said:?}"));
    };
    let offers = |provider: Provider| values("provider").any(|name| name == provider.name());
    let Some(provider) = [Provider::Tcp, Provider::TcpRxm].into_iter().find(|&provider| offers(provider))
    else {
        return Err(format!("{path} ({version}) has neither the tcp provider nor tcp;ofi_rxm"));
    };
    Ok(Libfabric { path: path.into(), version: version.to_owned(), provider })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_tcp_is_preferred() {
        let said =
            "path /a b/libfabric.so.1\nversion 2.1\nprovider shm\nprovider tcp;ofi_rxm\nprovider tcp\n";
        let found = parse(said).unwrap();
        assert_eq!((found.path.to_str(), found.provider), (Some("/a b/libfabric.so.1"), Provider::Tcp));
    }

    #[test]
    fn an_old_library_serves_through_rxm() {
        let found = parse("path libfabric.so.1\nversion 1.17\nprovider tcp;ofi_rxm\nprovider net\n").unwrap();
        assert_eq!(found.provider, Provider::TcpRxm);
    }

    #[test]
    fn a_library_without_tcp_does_not_serve() {
        assert!(parse("path libfabric.so.1\nversion 2.1\nprovider efa\n").unwrap_err().contains("tcp"));
        assert!(parse("").is_err());
    }
}
