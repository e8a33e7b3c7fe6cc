SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
CREATE SCHEMA was;
CREATE TYPE public.studydirection AS ENUM (
    'NOT_SET',
    'MINIMIZE',
    'MAXIMIZE'
);
CREATE TYPE public.trialintermediatevaluetype AS ENUM (
    'FINITE',
    'INF_POS',
    'INF_NEG',
    'NAN'
);
CREATE TYPE public.trialstate AS ENUM (
    'RUNNING',
    'COMPLETE',
    'PRUNED',
    'FAIL',
    'WAITING'
);
CREATE TYPE public.trialvaluetype AS ENUM (
    'FINITE',
    'INF_POS',
    'INF_NEG'
);
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.studies (
    study_id integer NOT NULL,
    study_name character varying(512) NOT NULL
);
CREATE SEQUENCE public.studies_study_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.studies_study_id_seq OWNED BY public.studies.study_id;
CREATE TABLE public.study_directions (
    study_direction_id integer NOT NULL,
    direction public.studydirection NOT NULL,
    study_id integer NOT NULL,
    objective integer NOT NULL
);
CREATE SEQUENCE public.study_directions_study_direction_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.study_directions_study_direction_id_seq OWNED BY public.study_directions.study_direction_id;
CREATE TABLE public.study_system_attributes (
    study_system_attribute_id integer NOT NULL,
    study_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.study_system_attributes_study_system_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.study_system_attributes_study_system_attribute_id_seq OWNED BY public.study_system_attributes.study_system_attribute_id;
CREATE TABLE public.study_user_attributes (
    study_user_attribute_id integer NOT NULL,
    study_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.study_user_attributes_study_user_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.study_user_attributes_study_user_attribute_id_seq OWNED BY public.study_user_attributes.study_user_attribute_id;
CREATE TABLE public.trial_heartbeats (
    trial_heartbeat_id integer NOT NULL,
    trial_id integer NOT NULL,
    heartbeat timestamp without time zone NOT NULL
);
CREATE SEQUENCE public.trial_heartbeats_trial_heartbeat_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_heartbeats_trial_heartbeat_id_seq OWNED BY public.trial_heartbeats.trial_heartbeat_id;
CREATE TABLE public.trial_intermediate_values (
    trial_intermediate_value_id integer NOT NULL,
    trial_id integer NOT NULL,
    step integer NOT NULL,
    intermediate_value double precision,
    intermediate_value_type public.trialintermediatevaluetype NOT NULL
);
CREATE SEQUENCE public.trial_intermediate_values_trial_intermediate_value_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_intermediate_values_trial_intermediate_value_id_seq OWNED BY public.trial_intermediate_values.trial_intermediate_value_id;
CREATE TABLE public.trial_params (
    param_id integer NOT NULL,
    trial_id integer,
    param_name character varying(512),
    param_value double precision,
    distribution_json text
);
CREATE SEQUENCE public.trial_params_param_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_params_param_id_seq OWNED BY public.trial_params.param_id;
CREATE TABLE public.trial_system_attributes (
    trial_system_attribute_id integer NOT NULL,
    trial_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.trial_system_attributes_trial_system_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_system_attributes_trial_system_attribute_id_seq OWNED BY public.trial_system_attributes.trial_system_attribute_id;
CREATE TABLE public.trial_user_attributes (
    trial_user_attribute_id integer NOT NULL,
    trial_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.trial_user_attributes_trial_user_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_user_attributes_trial_user_attribute_id_seq OWNED BY public.trial_user_attributes.trial_user_attribute_id;
CREATE TABLE public.trial_values (
    trial_value_id integer NOT NULL,
    trial_id integer NOT NULL,
    objective integer NOT NULL,
    value double precision,
    value_type public.trialvaluetype NOT NULL
);
CREATE SEQUENCE public.trial_values_trial_value_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_values_trial_value_id_seq OWNED BY public.trial_values.trial_value_id;
CREATE TABLE public.trials (
    trial_id integer NOT NULL,
    number integer,
    study_id integer,
    state public.trialstate NOT NULL,
    datetime_start timestamp without time zone,
    datetime_complete timestamp without time zone
);
CREATE SEQUENCE public.trials_trial_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trials_trial_id_seq OWNED BY public.trials.trial_id;
CREATE TABLE public.version_info (
    version_info_id integer NOT NULL,
    schema_version integer,
    library_version character varying(256),
    CONSTRAINT version_info_version_info_id_check CHECK ((version_info_id = 1))
);
CREATE TABLE was.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE was.artifact (
    kind text NOT NULL,
    key text NOT NULL,
    meta jsonb DEFAULT '{}'::jsonb NOT NULL,
    payload bytea NOT NULL,
    sha256 text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);
ALTER TABLE ONLY was.artifact ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE TABLE was.control (
    study_id integer NOT NULL,
    wish text DEFAULT 'run'::text NOT NULL,
    wished_at timestamp with time zone DEFAULT now() NOT NULL,
    trials integer,
    workers text,
    max_seconds double precision,
    max_gpu_seconds double precision,
    max_failures integer,
    patience integer,
    CONSTRAINT control_wish CHECK ((wish = ANY (ARRAY['run'::text, 'pause'::text, 'drain'::text, 'cancel'::text])))
);
CREATE TABLE was.run (
    study_id integer NOT NULL,
    epoch integer NOT NULL,
    coordinator text NOT NULL,
    started_at timestamp with time zone DEFAULT now() NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL,
    ended_at timestamp with time zone,
    ending text DEFAULT ''::text NOT NULL,
    detail text DEFAULT ''::text NOT NULL,
    paused boolean DEFAULT false NOT NULL,
    workers integer DEFAULT 0 NOT NULL,
    gpus_per_worker double precision DEFAULT 0 NOT NULL,
    seconds double precision DEFAULT 0 NOT NULL,
    worker_seconds double precision DEFAULT 0 NOT NULL,
    gpu_seconds double precision DEFAULT 0 NOT NULL,
    pool jsonb DEFAULT '{}'::jsonb NOT NULL
);
CREATE TABLE was.slot (
    study_id integer NOT NULL,
    number integer NOT NULL,
    state text DEFAULT 'waiting'::text NOT NULL,
    attempt integer DEFAULT 0 NOT NULL,
    epoch integer DEFAULT 0 NOT NULL,
    origin text DEFAULT ''::text NOT NULL,
    params jsonb,
    distributions jsonb,
    attrs jsonb,
    levels double precision[],
    sparsities double precision[],
    losses double precision[],
    loss_nats double precision,
    tokens bigint DEFAULT 0 NOT NULL,
    seconds double precision DEFAULT 0 NOT NULL,
    achieved double precision,
    worker text DEFAULT ''::text NOT NULL,
    lease_expires_at timestamp with time zone,
    trial_id integer,
    error text DEFAULT ''::text NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    nll_nats double precision,
    CONSTRAINT slot_state CHECK ((state = ANY (ARRAY['waiting'::text, 'running'::text, 'complete'::text, 'stopped'::text, 'failed'::text])))
);
CREATE TABLE was.study (
    id integer NOT NULL,
    name text NOT NULL,
    optuna_study_id integer,
    identity jsonb NOT NULL,
    config jsonb NOT NULL,
    shape jsonb NOT NULL,
    epoch integer DEFAULT 0 NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    versions jsonb DEFAULT '{}'::jsonb NOT NULL,
    report jsonb DEFAULT '{}'::jsonb NOT NULL
);
CREATE SEQUENCE was.study_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE was.study_id_seq OWNED BY was.study.id;
ALTER TABLE ONLY public.studies ALTER COLUMN study_id SET DEFAULT nextval('public.studies_study_id_seq'::regclass);
ALTER TABLE ONLY public.study_directions ALTER COLUMN study_direction_id SET DEFAULT nextval('public.study_directions_study_direction_id_seq'::regclass);
ALTER TABLE ONLY public.study_system_attributes ALTER COLUMN study_system_attribute_id SET DEFAULT nextval('public.study_system_attributes_study_system_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.study_user_attributes ALTER COLUMN study_user_attribute_id SET DEFAULT nextval('public.study_user_attributes_study_user_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.trial_heartbeats ALTER COLUMN trial_heartbeat_id SET DEFAULT nextval('public.trial_heartbeats_trial_heartbeat_id_seq'::regclass);
ALTER TABLE ONLY public.trial_intermediate_values ALTER COLUMN trial_intermediate_value_id SET DEFAULT nextval('public.trial_intermediate_values_trial_intermediate_value_id_seq'::regclass);
ALTER TABLE ONLY public.trial_params ALTER COLUMN param_id SET DEFAULT nextval('public.trial_params_param_id_seq'::regclass);
ALTER TABLE ONLY public.trial_system_attributes ALTER COLUMN trial_system_attribute_id SET DEFAULT nextval('public.trial_system_attributes_trial_system_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.trial_user_attributes ALTER COLUMN trial_user_attribute_id SET DEFAULT nextval('public.trial_user_attributes_trial_user_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.trial_values ALTER COLUMN trial_value_id SET DEFAULT nextval('public.trial_values_trial_value_id_seq'::regclass);
ALTER TABLE ONLY public.trials ALTER COLUMN trial_id SET DEFAULT nextval('public.trials_trial_id_seq'::regclass);
ALTER TABLE ONLY was.study ALTER COLUMN id SET DEFAULT nextval('was.study_id_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('v3.2.0.a');
INSERT INTO public.studies VALUES (1, 'an older study');
INSERT INTO public.study_directions VALUES (1, 'MINIMIZE', 1, 0);
INSERT INTO public.trial_intermediate_values VALUES (1, 2, 3, 2.5833333333333335, 'FINITE');
INSERT INTO public.trial_params VALUES (1, 1, 'level_0', 0.5, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (2, 1, 'level_1', 0.7, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (3, 2, 'level_0', 0.499, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (4, 2, 'level_1', 0.699, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (5, 3, 'level_0', 0.498, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (6, 3, 'level_1', 0.698, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (7, 4, 'level_0', 0.497, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (8, 4, 'level_1', 0.697, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (9, 5, 'level_0', 0.496, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (10, 5, 'level_1', 0.696, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_user_attributes VALUES (1, 1, 'origin', '"sampler:tpe"');
INSERT INTO public.trial_user_attributes VALUES (2, 1, 'levels', '[0.5, 0.7]');
INSERT INTO public.trial_user_attributes VALUES (3, 1, 'slot', '0');
INSERT INTO public.trial_user_attributes VALUES (4, 1, 'attempt', '1');
INSERT INTO public.trial_user_attributes VALUES (5, 1, 'worker', '"worker-0"');
INSERT INTO public.trial_user_attributes VALUES (6, 1, 'seconds', '1.5');
INSERT INTO public.trial_user_attributes VALUES (7, 1, 'tokens', '300');
INSERT INTO public.trial_user_attributes VALUES (8, 1, 'stopped_early', 'false');
INSERT INTO public.trial_user_attributes VALUES (9, 1, 'achieved_sparsity', '0.6');
INSERT INTO public.trial_user_attributes VALUES (10, 1, 'losses', '{"n": 3, "not_finite": 0, "mean_nats": 2.25, "std_nats": 0.25}');
INSERT INTO public.trial_user_attributes VALUES (11, 2, 'origin', '"sampler:tpe"');
INSERT INTO public.trial_user_attributes VALUES (12, 2, 'levels', '[0.499, 0.699]');
INSERT INTO public.trial_user_attributes VALUES (13, 2, 'slot', '1');
INSERT INTO public.trial_user_attributes VALUES (14, 2, 'attempt', '1');
INSERT INTO public.trial_user_attributes VALUES (15, 2, 'worker', '"worker-0"');
INSERT INTO public.trial_user_attributes VALUES (16, 2, 'seconds', '1.5');
INSERT INTO public.trial_user_attributes VALUES (17, 2, 'tokens', '300');
INSERT INTO public.trial_user_attributes VALUES (18, 2, 'stopped_early', 'true');
INSERT INTO public.trial_user_attributes VALUES (19, 2, 'achieved_sparsity', '0.6');
INSERT INTO public.trial_user_attributes VALUES (20, 2, 'losses', '{"n": 3, "not_finite": 0, "mean_nats": 2.5833333333333335, "std_nats": 0.3818813079129867}');
INSERT INTO public.trial_user_attributes VALUES (21, 3, 'origin', '"sampler:tpe"');
INSERT INTO public.trial_user_attributes VALUES (22, 3, 'levels', '[0.498, 0.698]');
INSERT INTO public.trial_user_attributes VALUES (23, 3, 'slot', '2');
INSERT INTO public.trial_user_attributes VALUES (24, 3, 'attempt', '1');
INSERT INTO public.trial_user_attributes VALUES (25, 3, 'worker', '"worker-0"');
INSERT INTO public.trial_user_attributes VALUES (26, 3, 'seconds', '1.5');
INSERT INTO public.trial_user_attributes VALUES (27, 3, 'tokens', '300');
INSERT INTO public.trial_user_attributes VALUES (28, 3, 'stopped_early', 'false');
INSERT INTO public.trial_user_attributes VALUES (29, 3, 'achieved_sparsity', '0.6');
INSERT INTO public.trial_user_attributes VALUES (30, 3, 'error', '"lost 3 times"');
INSERT INTO public.trial_user_attributes VALUES (31, 4, 'origin', '"sampler:tpe"');
INSERT INTO public.trial_user_attributes VALUES (32, 4, 'levels', '[0.497, 0.697]');
INSERT INTO public.trial_user_attributes VALUES (33, 4, 'slot', '3');
INSERT INTO public.trial_user_attributes VALUES (34, 4, 'attempt', '1');
INSERT INTO public.trial_user_attributes VALUES (35, 4, 'worker', '"worker-0"');
INSERT INTO public.trial_user_attributes VALUES (36, 4, 'seconds', '1.5');
INSERT INTO public.trial_user_attributes VALUES (37, 4, 'tokens', '300');
INSERT INTO public.trial_user_attributes VALUES (38, 4, 'stopped_early', 'false');
INSERT INTO public.trial_user_attributes VALUES (39, 4, 'achieved_sparsity', '0.6');
INSERT INTO public.trial_user_attributes VALUES (40, 4, 'losses', '{"n": 3, "not_finite": 0, "mean_nats": 3.25, "std_nats": 1.5206906325745548}');
INSERT INTO public.trial_user_attributes VALUES (41, 5, 'origin', '"sampler:tpe"');
INSERT INTO public.trial_user_attributes VALUES (42, 5, 'levels', '[0.496, 0.696]');
INSERT INTO public.trial_user_attributes VALUES (43, 5, 'slot', '4');
INSERT INTO public.trial_values VALUES (1, 1, 0, 2.25, 'FINITE');
INSERT INTO public.trial_values VALUES (2, 4, 0, 3.25, 'FINITE');
INSERT INTO public.trials VALUES (1, 0, 1, 'COMPLETE', '2026-11-24 13:54:55.473452', '2026-11-24 13:54:55.511649');
INSERT INTO public.trials VALUES (2, 1, 1, 'PRUNED', '2026-11-24 13:54:55.517683', '2026-11-24 13:54:55.550193');
INSERT INTO public.trials VALUES (3, 2, 1, 'FAIL', '2026-11-24 13:54:55.554842', '2026-11-24 13:54:55.581235');
INSERT INTO public.trials VALUES (4, 3, 1, 'COMPLETE', '2026-11-24 13:54:55.585914', '2026-11-24 13:54:55.614075');
INSERT INTO public.trials VALUES (5, 4, 1, 'RUNNING', '2026-11-24 13:54:55.619259', NULL);
INSERT INTO public.version_info VALUES (1, 12, '5.0.0');
INSERT INTO was.alembic_version VALUES ('0004');
INSERT INTO was.artifact VALUES ('histograms', 'key', '{"blocks": 2}', '\x7061796c6f6164', '239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5', '2026-11-24 13:54:55.636264+00');
INSERT INTO was.control VALUES (1, 'run', '2026-11-24 13:54:55.432864+00', NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO was.slot VALUES (1, 2, 'failed', 1, 1, 'sampler:tpe', '{"level_0": 0.498, "level_1": 0.698}', '{"level_0": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}", "level_1": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}"}', '{}', '{0.498,0.698}', '{0.498,0.498,0.498,0.498,0.498,0.498,0.498,0.698,0.698,0.698,0.698,0.698,0.698,0.698}', NULL, NULL, 300, 1.5, 0.6, 'worker-0', NULL, 3, 'lost 3 times', '2026-11-24 13:54:55.565679+00', '2026-11-24 13:54:55.567704+00', NULL);
INSERT INTO was.slot VALUES (1, 5, 'waiting', 0, 0, '', NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, '', NULL, NULL, '', NULL, NULL, NULL);
INSERT INTO was.slot VALUES (1, 3, 'complete', 1, 1, 'sampler:tpe', '{"level_0": 0.497, "level_1": 0.697}', '{"level_0": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}", "level_1": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}"}', '{}', '{0.497,0.697}', '{0.497,0.497,0.497,0.497,0.497,0.497,0.497,0.697,0.697,0.697,0.697,0.697,0.697,0.697}', '{2.5,2.25,5}', 3.25, 300, 1.5, 0.6, 'worker-0', NULL, 4, '', '2026-11-24 13:54:55.596494+00', '2026-11-24 13:54:55.598771+00', NULL);
INSERT INTO was.slot VALUES (1, 0, 'complete', 1, 1, 'sampler:tpe', '{"level_0": 0.5, "level_1": 0.7}', '{"level_0": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}", "level_1": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}"}', '{}', '{0.5,0.7}', '{0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.7,0.7,0.7,0.7,0.7,0.7,0.7}', '{2.5,2.25,2}', 2.25, 300, 1.5, 0.6, 'worker-0', NULL, 1, '', '2026-11-24 13:54:55.492139+00', '2026-11-24 13:54:55.495062+00', NULL);
INSERT INTO was.slot VALUES (1, 4, 'waiting', 0, 0, 'sampler:tpe', '{"level_0": 0.496, "level_1": 0.696}', '{"level_0": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}", "level_1": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}"}', '{}', '{0.496,0.696}', '{0.496,0.496,0.496,0.496,0.496,0.496,0.496,0.696,0.696,0.696,0.696,0.696,0.696,0.696}', NULL, NULL, 0, 0, NULL, '', NULL, 5, '', NULL, NULL, NULL);
INSERT INTO was.slot VALUES (1, 1, 'stopped', 1, 1, 'sampler:tpe', '{"level_0": 0.499, "level_1": 0.699}', '{"level_0": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}", "level_1": "{\"name\": \"FloatDistribution\", \"attributes\": {\"step\": null, \"low\": 0.0, \"high\": 1.0, \"log\": false}}"}', '{}', '{0.499,0.699}', '{0.499,0.499,0.499,0.499,0.499,0.499,0.499,0.699,0.699,0.699,0.699,0.699,0.699,0.699}', '{2.5,2.25,3}', 2.5833333333333335, 300, 1.5, 0.6, 'worker-0', NULL, 2, '', '2026-11-24 13:54:55.529363+00', '2026-11-24 13:54:55.531609+00', NULL);
INSERT INTO was.study VALUES (1, 'an older study', 1, '{"model": "tiny", "budget": 0.6}', '{"workers": 1}', '{"in_features": [[4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4, 4]], "out_features": [[4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4, 4]]}', 1, '2026-11-24 13:54:55.432864+00', '{"torch": "2.13.0+cpu", "optuna": "5.0.0", "triton": "3.9.0", "was-search": "0.1.0", "transformers": "5.24.0"}', '{"exported": {"candidate": "slot 0"}}');
SELECT pg_catalog.setval('public.studies_study_id_seq', 1, true);
SELECT pg_catalog.setval('public.study_directions_study_direction_id_seq', 1, true);
SELECT pg_catalog.setval('public.study_system_attributes_study_system_attribute_id_seq', 1, false);
SELECT pg_catalog.setval('public.study_user_attributes_study_user_attribute_id_seq', 1, false);
SELECT pg_catalog.setval('public.trial_heartbeats_trial_heartbeat_id_seq', 1, false);
SELECT pg_catalog.setval('public.trial_intermediate_values_trial_intermediate_value_id_seq', 1, true);
SELECT pg_catalog.setval('public.trial_params_param_id_seq', 10, true);
SELECT pg_catalog.setval('public.trial_system_attributes_trial_system_attribute_id_seq', 1, false);
SELECT pg_catalog.setval('public.trial_user_attributes_trial_user_attribute_id_seq', 43, true);
SELECT pg_catalog.setval('public.trial_values_trial_value_id_seq', 2, true);
SELECT pg_catalog.setval('public.trials_trial_id_seq', 5, true);
SELECT pg_catalog.setval('was.study_id_seq', 1, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.studies
    ADD CONSTRAINT studies_pkey PRIMARY KEY (study_id);
ALTER TABLE ONLY public.study_directions
    ADD CONSTRAINT study_directions_pkey PRIMARY KEY (study_direction_id);
ALTER TABLE ONLY public.study_directions
    ADD CONSTRAINT study_directions_study_id_objective_key UNIQUE (study_id, objective);
ALTER TABLE ONLY public.study_system_attributes
    ADD CONSTRAINT study_system_attributes_pkey PRIMARY KEY (study_system_attribute_id);
ALTER TABLE ONLY public.study_system_attributes
    ADD CONSTRAINT study_system_attributes_study_id_key_key UNIQUE (study_id, key);
ALTER TABLE ONLY public.study_user_attributes
    ADD CONSTRAINT study_user_attributes_pkey PRIMARY KEY (study_user_attribute_id);
ALTER TABLE ONLY public.study_user_attributes
    ADD CONSTRAINT study_user_attributes_study_id_key_key UNIQUE (study_id, key);
ALTER TABLE ONLY public.trial_heartbeats
    ADD CONSTRAINT trial_heartbeats_pkey PRIMARY KEY (trial_heartbeat_id);
ALTER TABLE ONLY public.trial_heartbeats
    ADD CONSTRAINT trial_heartbeats_trial_id_key UNIQUE (trial_id);
ALTER TABLE ONLY public.trial_intermediate_values
    ADD CONSTRAINT trial_intermediate_values_pkey PRIMARY KEY (trial_intermediate_value_id);
ALTER TABLE ONLY public.trial_intermediate_values
    ADD CONSTRAINT trial_intermediate_values_trial_id_step_key UNIQUE (trial_id, step);
ALTER TABLE ONLY public.trial_params
    ADD CONSTRAINT trial_params_pkey PRIMARY KEY (param_id);
ALTER TABLE ONLY public.trial_params
    ADD CONSTRAINT trial_params_trial_id_param_name_key UNIQUE (trial_id, param_name);
ALTER TABLE ONLY public.trial_system_attributes
    ADD CONSTRAINT trial_system_attributes_pkey PRIMARY KEY (trial_system_attribute_id);
ALTER TABLE ONLY public.trial_system_attributes
    ADD CONSTRAINT trial_system_attributes_trial_id_key_key UNIQUE (trial_id, key);
ALTER TABLE ONLY public.trial_user_attributes
    ADD CONSTRAINT trial_user_attributes_pkey PRIMARY KEY (trial_user_attribute_id);
ALTER TABLE ONLY public.trial_user_attributes
    ADD CONSTRAINT trial_user_attributes_trial_id_key_key UNIQUE (trial_id, key);
ALTER TABLE ONLY public.trial_values
    ADD CONSTRAINT trial_values_pkey PRIMARY KEY (trial_value_id);
ALTER TABLE ONLY public.trial_values
    ADD CONSTRAINT trial_values_trial_id_objective_key UNIQUE (trial_id, objective);
ALTER TABLE ONLY public.trials
    ADD CONSTRAINT trials_pkey PRIMARY KEY (trial_id);
ALTER TABLE ONLY public.version_info
    ADD CONSTRAINT version_info_pkey PRIMARY KEY (version_info_id);
ALTER TABLE ONLY was.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY was.artifact
    ADD CONSTRAINT artifact_pkey PRIMARY KEY (kind, key);
ALTER TABLE ONLY was.control
    ADD CONSTRAINT control_pkey PRIMARY KEY (study_id);
ALTER TABLE ONLY was.run
    ADD CONSTRAINT run_pkey PRIMARY KEY (study_id, epoch);
ALTER TABLE ONLY was.slot
    ADD CONSTRAINT slot_pkey PRIMARY KEY (study_id, number);
ALTER TABLE ONLY was.study
    ADD CONSTRAINT study_name_key UNIQUE (name);
ALTER TABLE ONLY was.study
    ADD CONSTRAINT study_pkey PRIMARY KEY (id);
CREATE UNIQUE INDEX ix_studies_study_name ON public.studies USING btree (study_name);
CREATE INDEX ix_trials_study_id ON public.trials USING btree (study_id);
ALTER TABLE ONLY public.study_directions
    ADD CONSTRAINT study_directions_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.study_system_attributes
    ADD CONSTRAINT study_system_attributes_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.study_user_attributes
    ADD CONSTRAINT study_user_attributes_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.trial_heartbeats
    ADD CONSTRAINT trial_heartbeats_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_intermediate_values
    ADD CONSTRAINT trial_intermediate_values_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_params
    ADD CONSTRAINT trial_params_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_system_attributes
    ADD CONSTRAINT trial_system_attributes_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_user_attributes
    ADD CONSTRAINT trial_user_attributes_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_values
    ADD CONSTRAINT trial_values_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trials
    ADD CONSTRAINT trials_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY was.control
    ADD CONSTRAINT control_study_id_fkey FOREIGN KEY (study_id) REFERENCES was.study(id) ON DELETE CASCADE;
ALTER TABLE ONLY was.run
    ADD CONSTRAINT run_study_id_fkey FOREIGN KEY (study_id) REFERENCES was.study(id) ON DELETE CASCADE;
ALTER TABLE ONLY was.slot
    ADD CONSTRAINT slot_study_id_fkey FOREIGN KEY (study_id) REFERENCES was.study(id) ON DELETE CASCADE;
