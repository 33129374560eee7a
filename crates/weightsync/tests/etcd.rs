//! A job whose controllers take turns over a real etcd, with the sessions that find them there.
#![cfg(feature = "etcd")]

use std::time::Duration;

use weightsync::{
    Controller, DType, Fabric, Inference, OnLoss, ParamMap, Record, Served, ServerConfig, ServerHandle,
    SessionConfig, TensorSpec, Trainer, World,
};

#[path = "../../rendezvous/tests/etcd/daemon.rs"]
#[allow(dead_code, reason = "another test uses the rest")]
mod daemon;

const WORLD: World = World { trainers: 1, inference: 1 };
const DEADLINE: Duration = Duration::from_secs(6);

async fn controller(url: &str) -> ServerHandle {
    let mut config = ServerConfig::loopback(WORLD).unwrap();
    config.controller.deadline = DEADLINE;
    config.controller.on_loss = OnLoss::Wait;
    config.record = Record::Etcd { url: url.to_owned(), advertise: None };
    Controller::bind(config).await.unwrap().spawn(|_| {})
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_find_the_controller_that_takes_over() {
    let Some(etcd) = daemon::Daemon::start() else { return };
    let url = etcd.url();
    let first = controller(&url).await;
    let session = |rank| {
        let mut config = SessionConfig::new(url.clone(), WORLD, rank);
        (config.fabric, config.deadline) = (Fabric::Local, DEADLINE);
        config
    };
    let mut trainer = Trainer::new(session(0));
    let id = trainer.allocate(vec![TensorSpec::whole("w", DType::U8, &[1000]).unwrap()]).unwrap()[0];
    let mut inference = Inference::new(session(0));
    let w = inference.register("w", DType::U8, &[1000], ParamMap::tensor("w")).unwrap();
    let (trainer, inference) = tokio::join!(trainer.connect(), inference.connect());
    let (mut trainer, mut inference) = (trainer.unwrap(), inference.unwrap());
    trainer.tensor_mut(id).unwrap().fill(1);
    let (pushed, served) = tokio::join!(trainer.push(1), inference.wait_version(1, None));
    pushed.unwrap();
    served.unwrap();

    // The other stands by until the lease of the first has ended.
    let _second = controller(&url).await;
    drop(first);
    let again = async {
        while let Err(error) = trainer.push(1).await {
            if error.to_string().contains("not newer than the committed version 1") {
                break;
            }
            assert!(error.may_be_tried_again(), "{error}");
        }
        assert_eq!(trainer.committed(), 1, "the second knows what the first committed");
        trainer.tensor_mut(id).unwrap().fill(2);
        while let Err(error) = trainer.push(2).await {
            assert!(error.may_be_tried_again(), "{error}");
        }
    };
    let serves = async {
        loop {
            match inference.wait_version(2, None).await {
                Ok(_) => break,
                Err(error) => assert!(error.may_be_tried_again(), "{error}"),
            }
        }
    };
    tokio::join!(again, serves);
    assert_eq!(inference.served(), Served::Version(2));
    let mut bytes = [0; 1000];
    inference.read(w, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 1000]);
}
