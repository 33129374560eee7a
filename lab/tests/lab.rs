//! Labs as their users build them, on the real kernel. Skipped where there is no root or no iproute2.
//!
//! Tests run beside each other and beside labs of others: each uses names of its own, and looks only at those.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use weightsync_lab::{Lab, LabError, LabOptions, Side, check, down, list, namespace};

/// The longest that something may take that is not waited for by its cause.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which lab [`owner_process`] is to build.
const OWNER: &str = "WEIGHTSYNC_LAB_TEST_OWNER";

/// What [`datagram_process`] is to do.
const ROLE: &str = "WEIGHTSYNC_LAB_TEST_ROLE";

/// Whether labs can be built here; says so if not, and fails where `WEIGHTSYNC_REQUIRE` asks for it.
fn has_lab() -> bool {
    let Err(why) = check() else { return true };
    let required = std::env::var("WEIGHTSYNC_REQUIRE").unwrap_or_default();
    assert!(!required.contains("lab"), "a lab is required here: {why}");
    println!("skipped: needs root and iproute2: {why}");
    false
}

fn name(of: &str) -> String {
    format!("test-{}-{of}", std::process::id())
}

fn links(links: u16) -> LabOptions {
    LabOptions { links, ..LabOptions::default() }
}

/// What `work` gives, if it does in time. Else this fails, and what was started in a lab ends with that.
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result.recv_timeout(PATIENCE).unwrap_or_else(|why| panic!("{what}: {why} ({PATIENCE:?})"))
}

fn output(command: &mut Command) -> String {
    let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let output = in_time(&format!("{command:?}"), || started.wait_with_output()).unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The NICs of a namespace.
fn devices(lab: &Lab, side: Side) -> Vec<String> {
    let listed = output(lab.command(side, "ls").arg("/sys/class/net"));
    listed.lines().map(str::to_owned).collect()
}

/// Rate in bits per second and burst in bytes of every NIC, as the kernel has them.
fn shaping(lab: &Lab, side: Side) -> Vec<(String, u64, u64)> {
    let shown = output(lab.command(side, "tc").args(["qdisc", "show"]));
    let of_line = |line: &str| {
        let after = |word: &str| line.split_whitespace().skip_while(|found| *found != word).nth(1);
        let rate = weightsync_lab::parse_rate(&after("rate")?.to_lowercase()).unwrap();
        let burst = after("burst")?.trim_end_matches('b');
        let burst = match burst.strip_suffix('K') {
            Some(kib) => kib.parse::<u64>().unwrap() << 10,
            None => burst.parse().unwrap(),
        };
        Some((after("dev")?.to_owned(), rate, burst))
    };
    let mut shaping: Vec<_> = shown.lines().filter_map(of_line).collect();
    shaping.sort();
    shaping
}

fn nothing_is_left(name: &str) -> bool {
    let namespaces = output(Command::new("ip").args(["netns", "list"]));
    let devices = output(Command::new("ip").args(["-brief", "link"]));
    !namespaces.contains(&format!("weightsync-{name}-"))
        && !devices.contains("rail0")
        && !Path::new("/run/weightsync-lab").join(name).exists()
        && !list().iter().any(|(found, _)| found == name)
}

fn becomes_true(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "not after {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// How a process ended. One that does not is killed.
fn ended(process: &mut Child) -> ExitStatus {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        if Instant::now() >= until {
            drop(process.kill());
            panic!("process {} is not at its end after {PATIENCE:?}", process.id());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// The rest of the first line of its output that begins with `word`.
fn told(process: &mut Child, word: &'static str) -> String {
    let mut said = BufReader::new(process.stdout.take().unwrap());
    let (told, said) = in_time(word, move || {
        let mut lines = said.by_ref().lines().map(Result::unwrap);
        let told = lines.find_map(|line| line.strip_prefix(word).map(str::to_owned));
        (told, said.into_inner())
    });
    // It may have more to say.
    process.stdout = Some(said);
    told.expect("it says so before it ends")
}

fn becomes_program(process: &Child, program: &str) {
    let comm = format!("/proc/{}/comm", process.id());
    becomes_true(program, || fs::read_to_string(&comm).unwrap().trim_end() == program);
}

#[test]
fn thirty_two_links_come_and_go() {
    if !has_lab() {
        return;
    }
    let name = name("many");
    let options = LabOptions { slow: vec![(5, 10_000_000), (31, 1_000_000_000)], mtu: 9000, ..links(32) };
    let lab = Lab::up(&name, &options).unwrap();
    for side in Side::ALL {
        let found = devices(&lab, side);
        assert_eq!(found.len(), 32 + 2, "rails, control and loopback: {found:?}");
        let states = output(lab.command(side, "sh").args(["-c", "cat /sys/class/net/*/operstate"]));
        assert_eq!(states.lines().filter(|state| *state == "up").count(), 32 + 1, "{states}");
        let shaping = shaping(&lab, side);
        assert_eq!(shaping.len(), 32, "control is not shaped: {shaping:?}");
        for (device, rate, burst) in shaping {
            let link: u16 = device.strip_prefix("rail").unwrap().parse().unwrap();
            assert_eq!(rate, options.rate_of(link), "{device}");
            // The kernel keeps it as a time.
            assert!(burst.abs_diff(256 << 10) < 256, "{device}: {burst}");
        }
        let mtu = output(lab.command(side, "cat").arg("/sys/class/net/rail31/mtu"));
        assert_eq!(mtu.trim(), "9000");
    }
    assert_eq!(lab.prefix(Side::B), ["ip", "netns", "exec", &namespace(&name, Side::B)]);
    // Something that nobody waits for must not outlive it.
    let mut sleeper = lab.command(Side::B, "sleep").arg("1000").spawn().unwrap();
    becomes_program(&sleeper, "sleep");
    drop(lab);
    assert!(nothing_is_left(&name));
    assert_eq!(ended(&mut sleeper).signal(), Some(9));
}

/// `spawn` returns when `ip` has begun, long before it has entered the namespace.
#[test]
fn who_is_about_to_enter_does_not_outlive_the_lab() {
    if !has_lab() {
        return;
    }
    let name = name("entering");
    for round in 0..30 {
        let lab = Lab::up(&name, &links(1)).unwrap();
        // Several, so that some are late. One that is missed ends by itself, but not in time.
        let sleeper = |_| {
            let mut sleeper = lab.command(Side::A, "sleep");
            sleeper.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            sleeper.spawn().unwrap()
        };
        let mut sleepers: Vec<Child> = (0..8).map(sleeper).collect();
        thread::sleep(round * Duration::from_micros(100));
        drop(lab);
        for sleeper in &mut sleepers {
            // Killed, or too late to open a namespace of that name.
            let status = ended(sleeper);
            assert!(status.signal() == Some(9) || status.code().is_some_and(|code| code != 0), "{status}");
        }
        assert!(nothing_is_left(&name));
    }
}

/// The same moment, held: a process of that name has the namespace's file open and does not enter.
#[test]
fn of_those_who_hold_a_namespace_only_ip_is_killed() {
    if !has_lab() {
        return;
    }
    let lab = Lab::up(&name("held"), &links(1)).unwrap();
    let other = Lab::up(&name("held-other"), &links(1)).unwrap();
    let holder = |lab: &Lab, program: &str| {
        let script = "exec 3< $1; printf $2 > /proc/$$/comm; echo holds; read line; true";
        let file = format!("/run/netns/{}", namespace(lab.name(), Side::B));
        let mut holder = Command::new("sh");
        holder.args(["-c", script, "sh", &file, program]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = holder.spawn().unwrap();
        told(&mut holder, "holds");
        holder
    };
    let mut entering = holder(&lab, "ip");
    let mut beside = [holder(&lab, "ipp"), holder(&other, "ip")];
    drop(lab);
    assert_eq!(ended(&mut entering).signal(), Some(9));
    for holder in &mut beside {
        assert_eq!(holder.try_wait().unwrap(), None);
        drop(holder.stdin.take());
        assert!(ended(holder).success());
    }
}

#[test]
fn two_labs_stand_beside_each_other_and_a_name_is_given_once() {
    if !has_lab() {
        return;
    }
    let (one, other) = (name("one"), name("other"));
    let first = Lab::up(&one, &links(1)).unwrap();
    let second = Lab::up(&other, &links(2)).unwrap();
    assert_eq!((devices(&first, Side::A).len(), devices(&second, Side::A).len()), (3, 4));
    let again = Lab::up(&one, &links(3)).unwrap_err();
    assert!(
        matches!(again, LabError::InUse { process: Some(id), .. } if id == std::process::id()),
        "{again}"
    );
    assert!(matches!(down(Some(&one)), Err(LabError::InUse { .. })), "it is somebody's");
    assert_eq!(devices(&first, Side::B).len(), 3, "and was not touched");
    drop(first);
    assert!(nothing_is_left(&one) && !nothing_is_left(&other));
    drop(second);
    assert!(nothing_is_left(&other));
}

#[test]
fn a_kept_lab_stands_until_it_is_taken_down() {
    if !has_lab() {
        return;
    }
    let (name, beside) = (name("kept"), name("beside-kept"));
    Lab::up(&name, &links(1)).unwrap().keep().unwrap();
    // This clears up after killed owners, and leaves what was kept alone.
    drop(Lab::up(&beside, &links(1)).unwrap());
    let again = Lab::up(&name, &links(1)).unwrap_err();
    assert!(matches!(again, LabError::Standing { .. }), "{again}");
    assert_eq!(down(Some(&name)).unwrap(), [name.as_str()]);
    assert!(nothing_is_left(&name));
    assert!(down(Some(&name)).unwrap().is_empty());
}

#[test]
fn what_a_killed_owner_left_is_removed_by_the_next() {
    if !has_lab() {
        return;
    }
    for (lab, next) in [("killed", "killed"), ("killed-too", "next")] {
        let (lab, next) = (name(lab), name(next));
        let mut owner = Command::new(std::env::current_exe().unwrap());
        owner.args(["--exact", "owner_process", "--ignored", "--nocapture"]).env(OWNER, &lab);
        let mut owner = owner.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let sleeper = Path::new("/proc").join(told(&mut owner, "sleeper "));
        assert!(!nothing_is_left(&lab) && sleeper.exists());
        owner.kill().unwrap();
        ended(&mut owner);

        let built = Lab::up(&next, &links(1)).unwrap();
        assert_eq!(devices(&built, Side::A), ["control", "lo", "rail0"]);
        // Another test's `up` may be about to remove it: then this one leaves it to that.
        becomes_true("the killed owner's lab is gone", || lab == next || nothing_is_left(&lab));
        // Its parent is gone too, so it may stay a zombie where nobody collects orphans.
        let gone =
            || fs::read(sleeper.join("cmdline")).is_ok_and(|line| line.is_empty()) || !sleeper.exists();
        becomes_true("the process in it is gone", gone);
        drop(built);
        assert!(nothing_is_left(&next));
    }
}

/// Not a test of its own: builds the lab that it is told of, starts a process in it, and waits to be killed.
#[test]
#[ignore = "started by another test"]
fn owner_process() {
    let Ok(name) = std::env::var(OWNER) else { return };
    let lab = Lab::up(&name, &links(2)).unwrap();
    let mut sleep = lab.command(Side::A, "sleep");
    let mut sleeper = sleep.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    becomes_program(&sleeper, "sleep");
    println!("\nsleeper {}", sleeper.id());
    // Ends with its parent, if that fails before it kills this.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    sleeper.kill().unwrap();
    ended(&mut sleeper);
}

#[test]
fn links_change_while_the_lab_stands() {
    if !has_lab() {
        return;
    }
    let lab = Lab::up(&name("change"), &links(3)).unwrap();
    lab.reshape(1, 250_000_000).unwrap();
    for side in Side::ALL {
        let rates: Vec<u64> = shaping(&lab, side).into_iter().map(|(_, rate, _)| rate).collect();
        assert_eq!(rates, [100_000_000, 250_000_000, 100_000_000]);
    }
    // A NIC that is down says nothing of its carrier, so the other end is asked: a cable has two.
    let carrier_at_a = |device: &str| {
        output(lab.command(Side::A, "cat").arg(format!("/sys/class/net/{device}/carrier"))) == "1\n"
    };
    becomes_true("link 2 is up", || carrier_at_a("rail2"));
    lab.set_link(Side::B, 2, false).unwrap();
    becomes_true("link 2 is down", || !carrier_at_a("rail2"));
    assert!(carrier_at_a("control"));
    lab.set_control(Side::B, false).unwrap();
    becomes_true("the control link is down", || !carrier_at_a("control"));
    lab.set_link(Side::B, 2, true).unwrap();
    lab.set_control(Side::B, true).unwrap();
    becomes_true("both are up again", || carrier_at_a("rail2") && carrier_at_a("control"));
    let routes = output(lab.command(Side::B, "ip").args(["route", "get", "10.0.2.1"]));
    assert!(routes.contains("dev rail2"), "{routes}");
    lab.delete_link(0).unwrap();
    for side in Side::ALL {
        assert_eq!(devices(&lab, side), ["control", "lo", "rail1", "rail2"]);
    }
    let gone = lab.delete_link(0).unwrap_err().to_string();
    assert!(gone.contains("link del rail0") && gone.contains("Cannot find device"), "{gone}");
    assert!(matches!(lab.reshape(3, 1_000_000), Err(LabError::Link { link: 3, links: 3 })));
    assert!(matches!(lab.reshape(1, 0), Err(LabError::OutOfRange { .. })));
}

/// A rank that is bound to NIC `i` writes to NIC `j` of its peer.
#[test]
fn every_address_reaches_every_nic_over_the_link_of_that_nic() {
    if !has_lab() {
        return;
    }
    let lab = Lab::up(&name("cross"), &links(3)).unwrap();
    let this_program = |side, role: &str| {
        let mut process = lab.command(side, std::env::current_exe().unwrap());
        process.args(["--exact", "datagram_process", "--ignored", "--nocapture"]).env(ROLE, role);
        process
    };
    let mut echo =
        this_program(Side::B, "echo").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let port = told(&mut echo, "port ");
    output(&mut this_program(Side::A, &port));
    drop(echo.stdin.take());
    ended(&mut echo);
}

/// Not a test of its own: echoes datagrams, or sends one from each address of side A to each of side B's.
#[test]
#[ignore = "started by another test"]
fn datagram_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    if role == "echo" {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        println!("\nport {}", socket.local_addr().unwrap().port());
        std::thread::spawn(move || {
            let mut datagram = [0; 2000];
            while let Ok((bytes, from)) = socket.recv_from(&mut datagram) {
                socket.send_to(&datagram[..bytes], from).unwrap();
            }
        });
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let port: u16 = role.parse().unwrap();
    let datagram = [7; 1000];
    let carried = |link| {
        let path = format!("/sys/class/net/{}/statistics/tx_bytes", Lab::device(link));
        fs::read_to_string(path).unwrap().trim().parse::<u64>().unwrap()
    };
    for (from, to) in (0..3).flat_map(|from| (0..3).map(move |to| (from, to))) {
        let socket = UdpSocket::bind((Lab::address(Side::A, from), 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let before = carried(to);
        socket.send_to(&datagram, (Lab::address(Side::B, to), port)).unwrap();
        let (bytes, _) = socket.recv_from(&mut [0; 2000]).unwrap_or_else(|error| {
            panic!("from NIC {from} to NIC {to}: {error}");
        });
        assert_eq!(bytes, datagram.len());
        assert!(carried(to) >= before + 1000, "from NIC {from} to NIC {to}: it went another way");
    }
}

#[test]
fn a_wrong_name_or_option_builds_nothing() {
    let error = Lab::up("no/name", &links(1)).unwrap_err();
    assert!(matches!(error, LabError::Name { .. }), "{error}");
    let error = Lab::up(&name("none"), &links(0)).unwrap_err();
    assert!(matches!(error, LabError::OutOfRange { .. }), "{error}");
    assert!(!list().iter().any(|(found, _)| *found == name("none")));
}

#[test]
fn payload_is_what_headers_leave() {
    assert_eq!(Lab::payload_share(1500), 1448.0 / 1514.0);
    assert!((Lab::payload_share(9000) - 0.992).abs() < 0.001);
    assert_eq!(Lab::payload_share(20), 0.0);
    assert_eq!(Lab::address(Side::B, 0x0102).to_string(), "10.1.2.2");
}
