//! Mutual TLS over real sockets, with certificates made here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use rendezvous::{
    Client, ClientConfig, Identity, IdentityError, RendezvousError, Secret, Server, ServerConfig,
    ServerHandle, Transport, World,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An authority, and a folder for what it signs.
struct Authority {
    folder: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a certificate is to be.
#[derive(Clone)]
struct Wanted {
    names: &'static [&'static str],
    last_year: i32,
    usage: Option<ExtendedKeyUsagePurpose>,
}

const CONTROLLER: Wanted = Wanted { names: &["localhost", "127.0.0.1"], last_year: 2100, usage: None };

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { folder, issuer }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn issue(&self, name: &str, wanted: Wanted) -> Identity {
        let names: Vec<String> = wanted.names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(wanted.last_year, 1, 1);
        params.extended_key_usages = wanted.usage.into_iter().collect();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let identity = Identity {
            ca: self.path("ca.pem"),
            certificate: self.path(&format!("{name}.pem")),
            key: self.path(&format!("{name}.key")),
            name: None,
        };
        std::fs::write(&identity.certificate, certificate.pem()).unwrap();
        std::fs::write(&identity.key, key.serialize_pem()).unwrap();
        identity
    }
}

async fn serve(transport: Transport, secret: &str) -> ServerHandle {
    let world = World { trainers: 1, inference: 1 };
    // Another address than loopback alone: what keeps strangers out is enough there.
    let listen = if secret.is_empty() && format!("{transport:?}").contains("tcp") {
        "127.0.0.1:0"
    } else {
        "0.0.0.0:0"
    };
    let config = ServerConfig {
        listen: listen.into(),
        secret: Secret::new(secret),
        transport,
        ..ServerConfig::loopback(world).unwrap()
    };
    Server::bind(config).await.unwrap().spawn(|_| {})
}

async fn connect(
    server: &ServerHandle,
    transport: Transport,
    secret: &str,
) -> Result<Client, RendezvousError> {
    let controller = format!("localhost:{}", server.local_addr().port());
    let deadline = Duration::from_secs(3);
    Client::connect(ClientConfig {
        controller,
        job: rendezvous::JOB_DEFAULT.into(),
        secret: Secret::new(secret),
        transport,
        deadline,
    })
    .await
}

fn refusal(result: Result<Client, RendezvousError>) -> String {
    match result {
        Ok(_) => panic!("it was let in"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn certificates_and_secret_both_count() {
    let authority = Authority::new();
    let transport = |name| Transport::tls(&authority.issue(name, CONTROLLER)).unwrap();
    let member = transport("member");

    let server = serve(transport("controller"), "").await;
    connect(&server, member.clone(), "").await.unwrap();

    let server = serve(transport("controller"), "known").await;
    connect(&server, member.clone(), "known").await.unwrap();
    let refused = refusal(connect(&server, member, "other").await);
    assert!(refused.contains("secret"), "{refused}");
}

#[tokio::test]
async fn strangers_are_refused_and_both_sides_say_why() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = serve(Transport::tls(&authority.issue("controller", CONTROLLER)).unwrap(), "").await;

    // Of another authority, which believes ours: the controller does not believe it.
    let mut stranger = other.issue("stranger", CONTROLLER);
    std::fs::write(
        other.path("both.pem"),
        format!(
            "{}{}",
            std::fs::read_to_string(authority.path("ca.pem")).unwrap(),
            std::fs::read_to_string(other.path("ca.pem")).unwrap()
        ),
    )
    .unwrap();
    stranger.ca = other.path("both.pem");
    let refused = refusal(connect(&server, Transport::tls(&stranger).unwrap(), "").await);
    assert!(refused.contains("no TLS with") && refused.contains("same authority"), "{refused}");

    // It does not believe the controller.
    let stranger = Transport::tls(&other.issue("stranger", CONTROLLER)).unwrap();
    let refused = refusal(connect(&server, stranger, "").await);
    assert!(refused.contains("another authority"), "{refused}");

    // No TLS at all, on either side.
    let refused = refusal(connect(&server, Transport::tcp(), "").await);
    assert!(refused.contains("TLS"), "{refused}");
    let plain = serve(Transport::tcp(), "").await;
    let member = Transport::tls(&authority.issue("member", CONTROLLER)).unwrap();
    let refused = refusal(connect(&plain, member.clone(), "").await);
    assert!(refused.contains("does it speak TLS"), "{refused}");

    // Nothing of this harmed it.
    connect(&server, member, "").await.unwrap();
}

#[tokio::test]
async fn the_controllers_name_counts() {
    let authority = Authority::new();
    let elsewhere = Wanted { names: &["controller.cluster"], ..CONTROLLER };
    let server = serve(Transport::tls(&authority.issue("controller", elsewhere)).unwrap(), "").await;
    let mut member = authority.issue("member", CONTROLLER);
    let refused = refusal(connect(&server, Transport::tls(&member).unwrap(), "").await);
    assert!(refused.contains("controller.cluster") && refused.contains("which name to expect"), "{refused}");
    member.name = Some("controller.cluster".into());
    connect(&server, Transport::tls(&member).unwrap(), "").await.unwrap();
}

#[tokio::test]
async fn a_certificate_for_servers_alone_admits_no_member() {
    let authority = Authority::new();
    let servers = Wanted { usage: Some(ExtendedKeyUsagePurpose::ServerAuth), ..CONTROLLER };
    let server = serve(Transport::tls(&authority.issue("controller", servers.clone())).unwrap(), "").await;
    let member = Transport::tls(&authority.issue("member", servers)).unwrap();
    refusal(connect(&server, member, "").await);
    let member = Transport::tls(&authority.issue("member", CONTROLLER)).unwrap();
    connect(&server, member, "").await.unwrap();
}

#[tokio::test]
async fn garbage_in_place_of_a_handshake_is_answered_and_closed() {
    let authority = Authority::new();
    let server = serve(Transport::tls(&authority.issue("controller", CONTROLLER)).unwrap(), "").await;
    let mut stream = TcpStream::connect(("127.0.0.1", server.local_addr().port())).await.unwrap();
    stream.write_all(&[0x16; 4096]).await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "it was not closed");
    assert!(answer.len() < 64, "a stranger was told {} bytes", answer.len());
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_name() {
    let (authority, other) = (Authority::new(), Authority::new());
    let good = authority.issue("good", CONTROLLER);
    Transport::tls(&good).unwrap();
    let fails = |identity: Identity, file: &Path| {
        let error = Transport::tls(&identity).unwrap_err();
        assert!(error.to_string().contains(&file.display().to_string()), "{error}");
        error
    };

    let missing = authority.path("missing");
    for identity in [
        Identity { ca: missing.clone(), ..good.clone() },
        Identity { certificate: missing.clone(), ..good.clone() },
        Identity { key: missing.clone(), ..good.clone() },
    ] {
        assert!(matches!(fails(identity, &missing), IdentityError::Read { .. }));
    }
    for (identity, file) in [
        (Identity { ca: good.key.clone(), ..good.clone() }, &good.key),
        (Identity { certificate: good.key.clone(), ..good.clone() }, &good.key),
        (Identity { key: good.certificate.clone(), ..good.clone() }, &good.certificate),
    ] {
        assert!(matches!(fails(identity, file), IdentityError::Missing { .. }));
    }
    let cut = authority.path("cut.pem");
    let text = std::fs::read_to_string(&good.certificate).unwrap();
    std::fs::write(&cut, &text[..text.len() / 2]).unwrap();
    fails(Identity { certificate: cut.clone(), ..good.clone() }, &cut);

    let second = authority.issue("second", CONTROLLER);
    let mixed = Identity { key: second.key.clone(), ..good.clone() };
    assert!(matches!(fails(mixed, &second.key), IdentityError::KeyMismatch { .. }));

    let expired = authority.issue("expired", Wanted { last_year: 2001, ..CONTROLLER });
    let file = expired.certificate.clone();
    assert!(matches!(fails(expired, &file), IdentityError::Expired { .. }));

    let foreign = Identity { ca: other.path("ca.pem"), ..good.clone() };
    assert!(matches!(fails(foreign, &good.certificate), IdentityError::UnknownCa { .. }));

    let named = Identity { name: Some("not a name".into()), ..good };
    assert!(matches!(Transport::tls(&named), Err(IdentityError::Name(_))));
}
