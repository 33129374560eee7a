//! Debian's packages, as far as a source tarball and a few build tools go.
//!
//! The archive is the one that the machine is configured for, whatever mirror that is. The source package comes from a
//! newer release of the same distribution, through lists and caches of our own: the system's apt configuration and
//! lists are read, never changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::step::Log;

/// A distribution whose newer releases package libfabric 2.1 or newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Distribution {
    /// `ID` in os-release.
    id: &'static str,
    /// Names under which any release may be configured instead of by its codename.
    aliases: &'static [&'static str],
    /// The release whose source is taken: long-lived, because short-lived ones leave the mirrors.
    newer: &'static str,
    /// Where in the archive libfabric is.
    components: &'static str,
}

const DISTRIBUTIONS: [Distribution; 2] = [
    Distribution {
        id: "debian",
        aliases: &["stable", "oldstable", "testing", "unstable", "sid"],
        newer: "trixie",
        components: "main",
    },
    Distribution { id: "ubuntu", aliases: &[], newer: "resolute", components: "main universe" },
];

/// Where packages come from, and by which key that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Archive {
    uris: String,
    /// A key's path or fingerprint, or a whole key in the following lines, as apt wrote it.
    signed_by: Option<String>,
}

/// Fetches the upstream tarball of a source package into `into`, which must not exist, by way of `scratch`.
pub(crate) fn fetch_tarball(package: &str, scratch: &Path, into: &Path, log: &Log) -> Result<(), Failure> {
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let (distribution, archive) = configured_archive(&os_release, &configured_sources()?)?;
    let failed = |what: &str, error| format!("cannot {what} in {}: {error}", scratch.display());
    fs::remove_dir_all(scratch).or_else(ignore_missing).map_err(|error| failed("start anew", error))?;
    // apt wants these two to be there.
    for dir in ["lists/partial", "cache/archives/partial", "download"] {
        fs::create_dir_all(scratch.join(dir)).map_err(|error| failed("make a folder", error))?;
    }
    let list = scratch.join("newer.sources");
    fs::write(&list, source_stanza(&archive, &distribution)).map_err(|error| failed("write", error))?;
    let name = format!("list the sources of {} {}", distribution.id, distribution.newer);
    log.step(&name, private(scratch, &list).arg("update"))?;
    let mut source = private(scratch, &list);
    source.args(["source", "--tar-only", package]).current_dir(scratch.join("download"));
    log.step(&format!("fetch the source of {package}"), &mut source)?;
    // The rename is last, so that a folder of this name always holds a whole tarball.
    fs::rename(scratch.join("download"), into).map_err(|error| failed("rename", error))?;
    // Lists that nobody needs again; if they stay, they only take room.
    fs::remove_dir_all(scratch).ok();
    Ok(())
}

/// Installs packages: as root, or where sudo asks no password. `Err` says what to type otherwise.
pub(crate) fn install(packages: &[&str], log: &Log) -> Result<(), Failure> {
    let by_hand = format!("install what is missing: apt-get install {}", packages.join(" "));
    let mut prefix: Vec<&str> = Vec::new();
    if !is_root() {
        let quiet = Command::new("sudo").args(["-n", "true"]).output();
        if !quiet.is_ok_and(|output| output.status.success()) {
            return Err(format!("{by_hand} (neither root nor sudo without a password here)"));
        }
        prefix = vec!["sudo", "-n"];
    }
    let apt_get = |arguments: &[&str]| {
        let mut words = prefix.clone();
        words.extend(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        words.extend(arguments);
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command
    };
    let name = format!("install {}", packages.join(", "));
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages);
    if log.step(&name, &mut apt_get(&arguments)).is_ok() {
        return Ok(());
    }
    // A fresh container has no package lists, and old lists name files that are gone: once more with new ones.
    log.step("refresh the package lists", &mut apt_get(&["update"]))
        .and_then(|()| log.step(&name, &mut apt_get(&arguments)))
        .map_err(|failure| format!("{by_hand}\n{failure}"))
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// apt-get with one list of sources and its own state.
fn private(scratch: &Path, list: &Path) -> Command {
    let mut command = Command::new("apt-get");
    let mut set = |option: &str, value: &Path| {
        command.arg("-o").arg(format!("{option}={}", value.display()));
    };
    set("Dir::Etc::sourcelist", list);
    set("Dir::Etc::sourceparts", Path::new("/dev/null"));
    set("Dir::State::Lists", &scratch.join("lists"));
    set("Dir::Cache", &scratch.join("cache"));
    set("Acquire::Languages", Path::new("none"));
    set("Acquire::Retries", Path::new("2"));
    // Without this an update that reached nothing counts as a success.
    set("APT::Update::Error-Mode", Path::new("any"));
    if is_root() {
        // apt's own user cannot write below a folder of root's.
        set("APT::Sandbox::User", Path::new("root"));
    }
    command
}

fn source_stanza(archive: &Archive, distribution: &Distribution) -> String {
    let signed_by = archive.signed_by.as_ref().map(|key| format!("Signed-By: {key}\n")).unwrap_or_default();
    let (uris, suite, components) = (&archive.uris, distribution.newer, distribution.components);
    format!("Types: deb-src\nURIs: {uris}\nSuites: {suite}\nComponents: {components}\n{signed_by}")
}

/// The machine's apt sources: every file's name and text.
fn configured_sources() -> Result<Vec<(PathBuf, String)>, Failure> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    paths.sort();
    let read = |path: PathBuf| fs::read_to_string(&path).ok().map(|text| (path, text));
    let sources: Vec<_> = paths.into_iter().filter_map(read).collect();
    if sources.is_empty() {
        return Err("no apt sources can be read in /etc/apt".to_owned());
    }
    Ok(sources)
}

/// The archive that this machine has for its own release.
fn configured_archive(
    os_release: &str,
    sources: &[(PathBuf, String)],
) -> Result<(Distribution, Archive), Failure> {
    let value = |key: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map_or("", |value| value.trim_matches('"')).to_owned()
    };
    let (id, codename) = (value("ID"), value("VERSION_CODENAME"));
    let Some(distribution) = DISTRIBUTIONS.into_iter().find(|distribution| distribution.id == id) else {
        return Err(format!(
            "no recipe for this system ({id:?}, and only Debian and Ubuntu are known); install libfabric 1.18 or \
             newer with its tcp provider, or set LIBFABRIC_SO to one"
        ));
    };
    let own = |suite: &str| suite == codename || distribution.aliases.contains(&suite);
    let archive = sources.iter().find_map(|(path, text)| match path.extension()?.to_str()? {
        "list" => text.lines().find_map(|line| one_line(line, own)),
        "sources" => text.split("\n\n").find_map(|stanza| deb822(stanza, own)),
        _ => None,
    });
    match archive {
        Some(archive) => Ok((distribution, archive)),
        None => Err(format!("no apt source for {codename:?} is configured in /etc/apt")),
    }
}

/// `deb [signed-by=/key.gpg] URI SUITE COMPONENT...`
fn one_line(line: &str, own: impl Fn(&str) -> bool) -> Option<Archive> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb-src").or_else(|| line.strip_prefix("deb"))?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    own(suite).then(|| Archive { uris: uri.to_owned(), signed_by: signed_by.map(str::to_owned) })
}

/// A stanza of `Field: value` lines; a line that starts with a space continues the value before it.
fn deb822(stanza: &str, own: impl Fn(&str) -> bool) -> Option<Archive> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in stanza.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            let (_, value) = fields.last_mut()?;
            value.push('\n');
            value.push_str(line);
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let field = |name: &str| fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let enabled = !matches!(field("enabled"), Some("no" | "false"));
    (enabled && field("suites")?.split_whitespace().any(own)).then_some(())?;
    Some(Archive { uris: field("uris")?.to_owned(), signed_by: field("signed-by").map(str::to_owned) })
}

/// For a removal of what need not be there.
pub(crate) fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str =
        "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nID=debian\n";

    fn archive(
        os_release: &str,
        file: &str,
        text: &str,
    ) -> Result<(&'static str, String, Option<String>), Failure> {
        let (distribution, archive) = configured_archive(os_release, &[(file.into(), text.to_owned())])?;
        Ok((distribution.id, archive.uris, archive.signed_by))
    }

    #[test]
    fn stanzas_of_a_new_debian() {
        let text = "Types: deb\n# an older snapshot\nURIs: http://mirror.example/security\nSuites: bookworm-security\n\
                    \nTypes: deb\nURIs: mirror+file:///etc/mirrors.list\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/debian.gpg\n";
        let expected = (
            "debian",
            "mirror+file:///etc/mirrors.list".into(),
            Some("/usr/share/keyrings/debian.gpg".into()),
        );
        assert_eq!(archive(DEBIAN, "debian.sources", text), Ok(expected));
    }

    #[test]
    fn lines_of_an_old_ubuntu() {
        let ubuntu = "ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=jammy\n";
        let text = "# deb http://mirror.example/old jammy main\n\
                    deb cdrom:[Ubuntu 22.04]/ jammy main\ndebug http://mirror.example/x jammy main\n\
                    deb http://mirror.example/updates jammy-updates main\n\
                    deb [ arch=amd64 signed-by=/k.gpg ] http://mirror.example/ubuntu jammy main # the base\n";
        let expected = ("ubuntu", "http://mirror.example/ubuntu".into(), Some("/k.gpg".into()));
        assert_eq!(archive(ubuntu, "sources.list", text), Ok(expected));
    }

    #[test]
    fn a_key_inside_the_stanza_is_carried_over() {
        let text = "Types: deb\nURIs: http://mirror.example/debian\nSuites: stable\nSigned-By:\n -----BEGIN\n .\n mQIN\n";
        let (distribution, archive) =
            configured_archive(DEBIAN, &[("a.sources".into(), text.into())]).unwrap();
        assert_eq!(
            source_stanza(&archive, &distribution),
            "Types: deb-src\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\n\
             Signed-By: \n -----BEGIN\n .\n mQIN\n"
        );
    }

    #[test]
    fn what_is_switched_off_or_foreign_is_not_taken() {
        let off = "Enabled: no\nURIs: http://mirror.example/debian\nSuites: bookworm\n";
        let foreign = "URIs: http://mirror.example/tool\nSuites: nodistro\n";
        for (file, text) in [
            ("a.sources", off),
            ("a.sources", foreign),
            ("a.save", "deb http://mirror.example bookworm main"),
        ] {
            assert!(archive(DEBIAN, file, text).unwrap_err().contains("bookworm"), "{text}");
        }
        assert!(archive("ID=fedora\n", "a.list", "").unwrap_err().contains("LIBFABRIC_SO"));
    }
}
