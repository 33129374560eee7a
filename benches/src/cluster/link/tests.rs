use proptest::prelude::*;
use tokio::net::TcpListener;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

async fn shake(root: &str, rank: &str, who: Who) -> (anyhow::Result<Who>, anyhow::Result<()>) {
    let (mut near, mut far) = pair().await;
    let (root, rank) = (Key::new(root), Key::new(rank));
    // Each side closes as soon as it gives up, as in real life.
    tokio::join!(async move { accept(&mut near, &root).await }, async move {
        introduce(&mut far, &rank, who).await
    })
}

#[test]
fn the_same_secret_is_accepted_and_another_refused_on_both_sides() {
    block_on(async {
        let who = Who { rank: 3, size: 4 };
        let (root, rank) = shake("a", "a", who).await;
        assert_eq!(root.unwrap(), who);
        rank.unwrap();
        for (root, rank) in [("a", "b"), ("", "b"), ("a", "")] {
            let (root, rank) = shake(root, rank, who).await;
            assert!(root.unwrap_err().to_string().contains("secret"));
            assert!(rank.unwrap_err().to_string().contains("secret"));
        }
    });
}

#[test]
fn a_proof_binds_role_nonces_rank_and_size() {
    let key = Key::new("a");
    let who = Who { rank: 0, size: 2 };
    let proof = key.proof(RANK, &[1; 32], &[2; 32], who);
    assert_ne!(proof, key.proof(ROOT, &[1; 32], &[2; 32], who));
    assert_ne!(proof, key.proof(RANK, &[2; 32], &[1; 32], who));
    assert_ne!(proof, key.proof(RANK, &[1; 32], &[2; 32], Who { rank: 1, size: 2 }));
    assert_ne!(proof, key.proof(RANK, &[1; 32], &[2; 32], Who { rank: 0, size: 3 }));
}

#[test]
fn a_closed_connection_and_a_silent_one_are_told_apart() {
    block_on(async {
        let (near, far) = pair().await;
        let (_link, mut incoming) = Link::<u32>::start::<u32>(near, DEADLINE).unwrap();
        drop(far);
        let error = incoming.recv().await.unwrap().unwrap_err();
        assert!(error.contains("has ended"), "{error}");

        // Open, but it says nothing; an end that is alive would.
        let (near, _far) = pair().await;
        let (_link, mut incoming) = Link::<u32>::start::<u32>(near, Duration::from_millis(50)).unwrap();
        let error = incoming.recv().await.unwrap().unwrap_err();
        assert!(error.contains("no sign of life"), "{error}");
    });
}

#[test]
fn a_long_claim_is_refused_before_it_is_read() {
    block_on(async {
        let (near, mut far) = pair().await;
        let (_link, mut incoming) = Link::<u32>::start::<u32>(near, DEADLINE).unwrap();
        far.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        let error = incoming.recv().await.unwrap().unwrap_err();
        assert!(error.contains("4294967295 bytes"), "{error}");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_sent_arrives_in_order_and_closing_loses_nothing(messages in prop::collection::vec(".{0,300}", 0..40)) {
        block_on(async {
            let (near, far) = pair().await;
            let (sender, _replies) = Link::<String>::start::<String>(near, DEADLINE).unwrap();
            let (_far, mut receiver) = Link::<String>::start::<String>(far, DEADLINE).unwrap();
            let all = messages.clone();
            let sending = async move {
                for message in &all {
                    sender.send(message).await.unwrap();
                }
                sender.close().await;
            };
            let receiving = async move {
                let mut got = Vec::new();
                while let Some(Ok(message)) = receiver.recv().await {
                    got.push(message);
                }
                got
            };
            let ((), got) = tokio::join!(sending, receiving);
            assert_eq!(got, messages);
        });
    }

    #[test]
    fn arbitrary_bytes_end_the_connection_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        block_on(async {
            let (near, mut far) = pair().await;
            let (_link, mut incoming) = Link::<u32>::start::<Vec<u32>>(near, DEADLINE).unwrap();
            far.write_all(&bytes).await.unwrap();
            drop(far);
            while let Some(Ok(_)) = incoming.recv().await {}
        });
    }
}
